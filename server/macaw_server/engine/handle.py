"""What the server holds of an engine, wherever that runs: its requests, its status, its counters."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

from macaw_server.config import EngineConfig
from macaw_server.engine.inflight import Entry, InflightTable, OnOutput
from macaw_server.engine.loop import (
    Abort,
    Add,
    GetStats,
    Inbound,
    LetGo,
    Outbound,
    Outputs,
    Stats,
    Withdraw,
    Withdrawn,
)
from macaw_server.engine.types import EngineInfo, EngineRequest, EngineStats, PublicPrefixes

Status = Literal["starting", "running", "restarting", "failed", "stopped"]


class EngineHandle(ABC):
    """The server's side of an `Engine`: a subclass starts and stops it, and carries the messages.

    Args:
        config: What to load and how.
        on_loading: Told what the engine is busy with while it loads.
        public_prefixes: Tokens of texts whose K/V all tenants share.

    Attributes:
        on_lost: Takes the requests of an engine that has died; without it they wait here for its return.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_loading: Callable[[str], None] = lambda _: None,
        public_prefixes: PublicPrefixes = (),
    ) -> None:
        self._config = config
        self._on_loading = on_loading
        self._public_prefixes = public_prefixes
        self.on_lost: Callable[[list[Entry]], None] | None = None
        self._table = InflightTable()
        self._withdrawn = Counter[str]()  # requests that the engine has not yet said to have forgotten, and how often
        self._info: EngineInfo | None = None
        self._status: Status = "stopped"
        self._stats = EngineStats()
        self._asked: list[asyncio.Future[EngineStats]] = []

    @abstractmethod
    async def start(self) -> None:
        """Load the model; returns when requests are being worked on. Raises `StartupError`."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop for good."""

    def kill(self) -> None:  # noqa: B027
        """Stop for sure, without waiting for anything; nothing to do where it shares this process's fate."""

    @abstractmethod
    def _send(self, message: Inbound) -> None:
        """Carry a message to the running engine."""

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model."""
        if self._info is None:
            raise RuntimeError("the engine has not started")
        return self._info

    @property
    def status(self) -> Status:
        """Whether requests are being worked on."""
        return self._status

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._table)

    def submit(self, request: EngineRequest, on_output: OnOutput) -> None:
        """Queue a request; while the engine restarts it waits here."""
        self.adopt(Entry(request, on_output))

    def adopt(self, entry: Entry) -> None:
        """Queue a request that another engine may have begun: it goes on behind the tokens that it has."""
        self._table.put(entry)
        if self._status == "running":
            self._send(Add(entry.request))
        elif self._status in ("failed", "stopped"):
            message = "the engine is gone; see the server's log"
            asyncio.get_running_loop().call_soon(self._table.fail, entry.request.request_id, message)

    def abort(self, request_ids: Iterable[str], *, keep_pages: bool = False) -> None:
        """Forget requests: one message, however many they are."""
        known = [request_id for request_id in request_ids if self._table.remove(request_id)]
        if known and self._status == "running":
            self._send(Abort(known, keep_pages))

    def withdraw(self, request_id: str) -> Entry | None:
        """Take back a request that waits, for another engine; None if it has begun or ended.

        It may be that it begins right now: then what it does here is not heard of any more, even where the request
        comes back before the engine has forgotten it.
        """
        entry = self._table.take_waiting(request_id)
        if entry is not None and self._status == "running":
            self._withdrawn[request_id] += 1
            self._send(Withdraw(request_id))
        return entry

    def let_go(self, holders: Iterable[str]) -> None:
        """Keep nothing for these any more; an engine that restarts has forgotten them."""
        if self._status == "running":
            self._send(LetGo(list(holders)))

    async def stats(self) -> EngineStats:
        """The engine's counters; the last ones known while it is not running."""
        if self._status == "running":
            self._asked.append(asyncio.get_running_loop().create_future())
            self._send(GetStats())
            self._stats = await self._asked[-1]
        return self._stats

    def _on_message(self, message: Outbound) -> None:
        match message:
            case Outputs(outputs):
                self._table.deliver([output for output in outputs if output.request_id not in self._withdrawn])
            case Withdrawn(request_id):
                self._withdrawn -= Counter([request_id])  # keeps what is above 0
            case Stats(stats):
                self._answer_stats(stats)

    def _answer_stats(self, stats: EngineStats | None = None) -> None:
        """Answer everybody who asked, with the last known counters if the engine will not."""
        asked, self._asked = self._asked, []
        for future in asked:
            if not future.done():
                future.set_result(stats or self._stats)
