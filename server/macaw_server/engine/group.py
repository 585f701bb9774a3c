"""Several engines as one: each request goes to one of them, and to another if that dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from statistics import fmean

from macaw_server.engine.handle import EngineHandle, Status
from macaw_server.engine.inflight import Entry, OnOutput
from macaw_server.engine.types import EngineInfo, EngineOutput, EngineRequest, EngineStats
from macaw_server.scheduler.placement import PlacementName, make_placer
from macaw_server.scheduler.placer import Placer
from macaw_server.scheduler.step_time import StepTimeModel

log = logging.getLogger(__name__)


class EngineGroup:
    """An `Engine` over several, all of one model and configuration.

    An engine that dies is started again by itself; its requests go on at once on those that are left, with the tokens
    they have. It gets new ones as soon as it is back. Where none is left they wait for the first to return. Calls that
    wait at one engine move to another where nobody waits, when they are done sooner there (`Placement.moves`).

    Args:
        members: Not started.
        placement: By name, which of them gets a request.
        prefix_caching: Whether they keep anything that a request may find.
    """

    def __init__(
        self,
        members: Sequence[EngineHandle],
        placement: PlacementName = "affinity",
        *,
        prefix_caching: bool = True,
    ) -> None:
        self._members = list(members)
        self._strategy: PlacementName = placement
        self._prefix_caching = prefix_caching
        self._placer: Placer | None = None
        self._lost: set[int] = set()
        self._placed: dict[str, tuple[int, EngineRequest]] = {}
        self._to_fill: set[int] = set()  # members that may have run out of calls that wait
        for i, member in enumerate(self._members):
            member.on_lost = self._on_lost(i)

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model, with the pages and rows of all engines together."""
        infos = [member.info for member in self._members]
        return replace(
            infos[0],
            num_pages=sum(info.num_pages for info in infos),
            max_model_len=min(info.max_model_len for info in infos),
            ahead_rows=sum(info.ahead_rows for info in infos),
        )

    @property
    def status(self) -> Status:
        """Running while one of them is; else that of the one that is best."""
        order: tuple[Status, ...] = ("running", "restarting", "starting", "failed", "stopped")
        return min((member.status for member in self._members), key=order.index)

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._placed)

    async def start(self) -> None:
        """Load the model in all of them at once; raises `StartupError` if one cannot."""
        await asyncio.gather(*(member.start() for member in self._members))
        info = self._members[0].info
        self._placer = make_placer(
            self._strategy,
            len(self._members),
            info.num_pages * info.page_size,
            StepTimeModel(),
            prefix_caching=self._prefix_caching,
        )

    async def stop(self) -> None:
        """Stop all of them."""
        await asyncio.gather(*(member.stop() for member in self._members))

    def kill(self) -> None:
        """Stop all of them for sure, without waiting for anything."""
        for member in self._members:
            member.kill()

    def submit(self, request: EngineRequest, on_output: OnOutput) -> None:
        """Queue a request on the engine that the placement chooses."""
        self._send(Entry(request, self._noting(request, on_output)))

    def abort(self, request_ids: Iterable[str], *, keep_pages: bool = False) -> None:
        """Forget requests: one message to each engine that has some."""
        by_member: dict[int, list[str]] = {}
        for request_id in request_ids:
            if request_id in self._placed:
                by_member.setdefault(self._placed[request_id][0], []).append(request_id)
                self._forget(request_id)
        for i, known in by_member.items():
            self._members[i].abort(known, keep_pages=keep_pages)
            self._rebalance_soon(i)

    def let_go(self, holders: Iterable[str]) -> None:
        """Keep nothing for these any more, in whichever engines something is kept."""
        known = list(holders)
        for member in self._members:
            member.let_go(known)

    async def stats(self) -> EngineStats:
        """The counters of all together."""
        return sum_stats(await self.member_stats())

    async def member_stats(self) -> list[EngineStats]:
        """The counters of each."""
        return await asyncio.gather(*(member.stats() for member in self._members))

    # --------------------------------------------------------------------------------------------------------

    @property
    def _placement(self) -> Placer:
        if self._placer is None:
            raise RuntimeError("the engines have not started")
        return self._placer

    def _send(self, entry: Entry) -> None:
        self._look_for_lost()
        i = self._waiting_place() if len(self._lost) == len(self._members) else self._placement.place(entry.request)
        self._placed[entry.request.request_id] = i, entry.request
        if entry.started:
            self._placement.admitted(entry.request.request_id)
        self._members[i].adopt(entry)

    def _look_for_lost(self) -> None:
        for i in [i for i in self._lost if self._members[i].status == "running"]:
            self._lost.remove(i)
            self._placement.restore(i)
            self._rebalance_soon(i)

    def _rebalance(self) -> None:
        """Give members where nobody waits calls that wait elsewhere, where that pays."""
        self._look_for_lost()
        targets, self._to_fill = self._to_fill, set()
        if self.status != "running":
            return
        for i in targets:
            for request_id, source, target in self._placement.moves(i):
                entry = self._members[source].withdraw(request_id)
                assert entry is not None, f"{request_id} does not wait at engine {source}"
                self._placed[request_id] = target, entry.request
                self._members[target].adopt(entry)

    def _rebalance_soon(self, i: int) -> None:
        """After all that has been said by now is heard: who has begun does not move."""
        if not self._to_fill:
            asyncio.get_running_loop().call_soon(self._rebalance)
        self._to_fill.add(i)

    def _waiting_place(self) -> int:
        """Where to wait while none is there: with one that will be back, if any."""
        coming = [i for i, member in enumerate(self._members) if member.status == "restarting"]
        return coming[0] if coming else 0

    def _noting(self, request: EngineRequest, on_output: OnOutput) -> OnOutput:
        def noting(output: EngineOutput) -> None:
            member = self._placed.get(output.request_id)
            if output.cached_tokens is not None:
                self._placement.admitted(output.request_id)
            if output.token_ids:
                self._placement.started(output.request_id)
            if ends := output.finish_reason is not None or output.error is not None:
                self._forget(request.request_id)
            if member is not None and (ends or output.cached_tokens is not None):
                self._rebalance_soon(member[0])
            on_output(output)

        return noting

    def _forget(self, request_id: str) -> None:
        if (placed := self._placed.pop(request_id, None)) is not None:
            self._placement.ended(placed[1], placed[1].output_ids)

    def _on_lost(self, i: int) -> Callable[[list[Entry]], None]:
        def on_lost(entries: list[Entry]) -> None:
            self._lost.add(i)
            self._placement.lose(i)
            log.warning("engine %d is gone; its %d calls go to the others", i, len(entries))
            for entry in entries:
                self._send(entry)

        return on_lost


def sum_stats(stats: Iterable[EngineStats]) -> EngineStats:
    """Counters and gauges of several engines together."""
    listed = list(stats)
    counters = [field.name for field in fields(EngineStats) if field.name != "step_time_ms"]
    total = EngineStats(**{name: sum(getattr(one, name) for one in listed) for name in counters})
    total.step_time_ms = {  # of one engine as of another: their mean
        name: fmean(one.step_time_ms[name] for one in listed)
        for name in listed[0].step_time_ms
        if all(name in one.step_time_ms for one in listed)
    }
    return total
