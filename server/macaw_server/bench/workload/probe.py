"""One side at one rate for a while: does it keep its programs within the allowed latency?"""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from macaw_server.bench.errors import RefusedError
from macaw_server.bench.workload.clients import WorkloadClient
from macaw_server.bench.workload.records import Outcome
from macaw_server.workloads import Part, ProgramSpec, Text


class Slo(NamedTuple):
    """What a side has to keep.

    Attributes:
        token_ms: Allowed latency of a program over its output tokens.
        share: Of the programs of each app that must be within it.
    """

    token_ms: float
    share: float

    def allowed_s(self, spec: ProgramSpec) -> float:
        """From the arrival; a program that takes longer is late."""
        return self.token_ms / 1000 * sum(call.output_len for call in spec.calls)

    def allowed_late(self, num_programs: int) -> int:
        """Of so many programs of one app."""
        return math.floor((1 - self.share) * num_programs + 1e-9)


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of one rate.

    Attributes:
        rate: Programs per second.
        sustained: Enough programs of each app were within the SLO.
        num_programs, num_within, num_late: Of them; of the rest it was not known when the probe was cut off.
        num_refused: Of the late ones, by the server, for its queue was full.
        cut_off: Programs were still running when it ended.
        token_ms, token_p90_ms: Latency per output token, mean and 90th percentile; late programs that were cut off
            count with the time they had, so that it is a lower bound then.
        ttft_s: Median, from the arrival to the first token of a target, of the programs that ended.
        cached_share: Of the prompt tokens of these.
        duration_s: Of the probe.
    """

    rate: float
    sustained: bool
    num_programs: int
    num_within: int
    num_late: int
    num_refused: int
    cut_off: bool
    token_ms: float | None
    token_p90_ms: float | None
    ttft_s: float | None
    cached_share: float
    duration_s: float


def fresh(spec: ProgramSpec, tag: str) -> ProgramSpec:
    """The same program with other texts, but for those that it shares with others: a cache knows nothing else of it."""

    def renamed(part: Part) -> Part:
        own = isinstance(part, Text) and part.key.startswith(f"{spec.id}/")
        return part._replace(key=f"{tag}/{part.key}") if isinstance(part, Text) and own else part

    calls = tuple(replace(call, parts=tuple(map(renamed, call.parts))) for call in spec.calls)
    return replace(spec, id=f"{tag}/{spec.id}", calls=calls)


async def probe(client: WorkloadClient, programs: Sequence[ProgramSpec], rate: float, slo: Slo) -> Probe:
    """Send the programs as they arrive, until it is known whether the rate is sustained.

    A program is late as soon as its deadline has passed, ended or not. When more are late than may be, the probe ends
    at once, and what still runs is cut off. Otherwise late programs may run on for as long again as the longest
    deadline.

    Raises:
        BenchError: A request failed, or an answer does not have the length that was asked for. A program that the
            server refuses because its queue is full is late, no error.
    """
    watch = _Watch(client.start(programs), programs, slo)
    last_s = max(spec.arrival_s + slo.allowed_s(spec) for spec in programs)
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(watch.over.wait(), last_s + max(map(slo.allowed_s, programs)))
        ended_s = client.now_s
    finally:
        await watch.stop()
    return watch.judge(rate, ended_s)


class _Watch:
    """Counts late programs as the clock passes their deadlines.

    Attributes:
        over: Set when more are late than may be, when none runs, and when one failed.
    """

    def __init__(self, tasks: Sequence[asyncio.Task[Outcome]], programs: Sequence[ProgramSpec], slo: Slo) -> None:
        self.over = asyncio.Event()
        self._tasks, self._programs, self._slo = tasks, programs, slo
        self._num_running = len(tasks)
        self._late: set[int] = set()
        self._cut_off: set[int] = set()
        self._num_left = {app: slo.allowed_late(num) for app, num in Counter(map(_app, programs)).items()}
        loop = asyncio.get_running_loop()
        self._timers = [
            loop.call_later(spec.arrival_s + slo.allowed_s(spec), self._add_late, i) for i, spec in enumerate(programs)
        ]
        for i, task in enumerate(tasks):
            task.add_done_callback(partial(self._on_end, i))

    async def stop(self) -> None:
        """Cut off what still runs."""
        for timer in self._timers:
            timer.cancel()
        self._cut_off.update(i for i, task in enumerate(self._tasks) if not task.done())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_end(self, i: int, task: asyncio.Task[Outcome]) -> None:
        if i in self._cut_off:
            return
        self._num_running -= 1
        self._timers[i].cancel()
        error = task.exception()
        if error or task.result().latency_s > self._slo.allowed_s(self._programs[i]):
            self._add_late(i)
        if not self._num_running or (error and not isinstance(error, RefusedError)):
            self.over.set()

    def _add_late(self, i: int) -> None:
        if i not in self._late:
            self._late.add(i)
            app = _app(self._programs[i])
            self._num_left[app] -= 1
            if self._num_left[app] < 0:
                self.over.set()

    def judge(self, rate: float, ended_s: float) -> Probe:
        """What came of it, after `stop`; `ended_s` is when it was called.

        Raises:
            BenchError: A program failed.
        """
        outcomes: list[Outcome] = []
        token_ms: list[float] = []
        for i, (spec, task) in enumerate(zip(self._programs, self._tasks, strict=True)):
            if i in self._cut_off:
                if i in self._late:
                    token_ms.append(1000 * (ended_s - spec.arrival_s) / sum(call.output_len for call in spec.calls))
            elif (error := task.exception()) is None:
                outcomes.append(task.result())
                token_ms.append(task.result().token_ms)
            elif not isinstance(error, RefusedError):
                raise error
        token_ms.sort()
        prompt_tokens = sum(outcome.prompt_tokens for outcome in outcomes)
        return Probe(
            rate=rate,
            sustained=min(self._num_left.values()) >= 0,
            num_programs=len(self._programs),
            num_within=len(self._programs) - len(self._late | self._cut_off),
            num_late=len(self._late),
            num_refused=len(self._programs) - len(outcomes) - len(self._cut_off),
            cut_off=bool(self._cut_off),
            token_ms=statistics.fmean(token_ms) if token_ms else None,
            token_p90_ms=token_ms[math.ceil(0.9 * len(token_ms)) - 1] if token_ms else None,
            ttft_s=statistics.median(o.first_token_s - o.spec.arrival_s for o in outcomes) if outcomes else None,
            cached_share=sum(outcome.cached_tokens for outcome in outcomes) / max(1, prompt_tokens),
            duration_s=ended_s,
        )


def _app(spec: ProgramSpec) -> str:
    return spec.app.partition("/")[0]
