"""The virtual clock: engines that take as long as the step-time model says, and everything else at once."""

from __future__ import annotations

import gc
import heapq
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from macaw_server.engine.types import EngineRequest
from macaw_server.kvcache import Eviction, KVCache
from macaw_server.scheduler import ScheduledBatch, Scheduler, SchedulerConfig, StepTimeModel, make_policy, step_features
from macaw_server.scheduler.placement import PlacementName, make_placer
from macaw_server.simulate.applications import Applications
from macaw_server.simulate.records import ProgramRecord, RunResult
from macaw_server.simulate.tokens import AbstractTokens
from macaw_server.workloads import ProgramSpec

Client = Literal["programs", "requests"]


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """What is simulated.

    Attributes:
        num_engines: Equal ones.
        policy: By name.
        num_pages: Pages of one engine.
        page_size: Tokens per page.
        max_num_seqs, max_num_batched_tokens, max_model_len: Limits of one engine.
        latency_slowdown: See `SchedulerConfig`; None is its default.
        client: Whether clients send programs, or each call by itself.
        rtt_s: Round trip between client and server.
        eviction, prefix_caching, single_flight: See `KVCache`.
        task_groups: See `AppPolicy`.
        placement: See `make_placer`.
    """

    num_engines: int = 1
    policy: str = "app"
    num_pages: int = 8192
    page_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int = 32_768
    latency_slowdown: float | None = None
    client: Client = "programs"
    rtt_s: float = 0.0
    eviction: Eviction = "value"
    prefix_caching: bool = True
    single_flight: bool = True
    task_groups: bool = True
    placement: PlacementName = "affinity"

    def scheduler(self, step_time: StepTimeModel) -> Scheduler:
        """The scheduler of one engine."""
        config = SchedulerConfig(
            self.max_num_seqs, max(self.max_num_batched_tokens, self.max_num_seqs), self.max_model_len
        )
        if self.latency_slowdown is not None:
            config = replace(config, latency_slowdown=self.latency_slowdown)
        cache = KVCache(
            self.num_pages,
            self.page_size,
            eviction=self.eviction,
            prefix_caching=self.prefix_caching,
            single_flight=self.single_flight,
        )
        return Scheduler(config, cache, make_policy(self.policy, task_groups=self.task_groups), step_time=step_time)


@dataclass(slots=True, eq=False)
class _Engine:
    """One engine; `batch` is what it runs, None while it is idle."""

    number: int
    scheduler: Scheduler
    batch: ScheduledBatch | None = None


class Simulation:
    """One run.

    Args:
        config: See there.
        step_time: How long steps take, as the engines' schedulers know, too; it is not changed.
        programs: In order of arrival; pulled as time goes on.
    """

    def __init__(self, config: SimulationConfig, step_time: StepTimeModel, programs: Iterable[ProgramSpec]) -> None:
        self._step_time = step_time
        self._programs = iter(programs)
        self._engines = [_Engine(i, config.scheduler(step_time)) for i in range(config.num_engines)]
        self._placement = (
            make_placer(
                config.placement,
                config.num_engines,
                config.num_pages * config.page_size,
                step_time,
                prefix_caching=config.prefix_caching,
            )
            if config.num_engines > 1
            else None
        )
        self._applications = Applications(
            AbstractTokens(), self, as_requests=config.client == "requests", rtt_s=config.rtt_s
        )
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_events = itertools.count()
        self._idle_with_work: dict[int, _Engine] = {}
        self._requests: dict[str, tuple[_Engine, EngineRequest, int]] = {}
        self._result = RunResult()

    def run(self) -> RunResult:
        """Until nothing happens any more."""
        begin = time.perf_counter()
        with _no_garbage_collection():
            self._next_arrival(0.0)
            while self._events:
                now_s, _, action = heapq.heappop(self._events)
                action(now_s)
                if not self._events or self._events[0][0] > now_s:
                    for engine in self._idle_with_work.values():
                        self._begin_step(engine, now_s)
                    self._idle_with_work.clear()
        assert not self._applications.num_live, f"{self._applications.num_live} programs never ended"
        stats = [engine.scheduler.stats() for engine in self._engines]
        self._result.num_preemptions = sum(each.preemptions for each in stats)
        self._result.num_evicted_pages = sum(each.evicted_pages for each in stats)
        self._result.wall_s = time.perf_counter() - begin
        return self._result

    # -- what the applications ask for -----------------------------------------------------------------------

    def submit(self, request: EngineRequest, now_s: float) -> None:
        """Queue a request with an engine."""
        begin = time.perf_counter()
        engine = self._engines[self._placement.place(request) if self._placement else 0]
        engine.scheduler.add(request, now_s)
        self._result.decision_s += time.perf_counter() - begin
        self._result.num_scheduled += 1
        # Answers are numbers that no prompt and no other answer has.
        self._requests[request.request_id] = engine, request, (1 << 70) + (self._result.num_scheduled << 20)
        if engine.batch is None:
            self._idle_with_work[engine.number] = engine

    def abort(self, request_id: str) -> None:
        """Forget a request."""
        if (found := self._requests.pop(request_id, None)) is not None:
            engine, request, _ = found
            engine.scheduler.abort(request_id)
            if self._placement:
                self._placement.ended(request, [])

    def let_go(self, program_id: str) -> None:
        """Keep no pages for a program any more."""
        for engine in self._engines:
            engine.scheduler.let_go([program_id])

    def call_at(self, time_s: float, action: Callable[[float], None]) -> None:
        """Call back when the time has come; equal times in the order of asking."""
        heapq.heappush(self._events, (time_s, next(self._num_events), action))

    def on_end(self, record: ProgramRecord) -> None:
        """Keep the record."""
        self._result.programs.append(record)
        self._result.duration_s = max(self._result.duration_s, record.ended_s)

    # -- the engines -----------------------------------------------------------------------------------------

    def _next_arrival(self, _: float) -> None:
        spec = next(self._programs, None)
        if spec is not None:
            self.call_at(spec.arrival_s, lambda now_s: self._arrive(spec, now_s))

    def _arrive(self, spec: ProgramSpec, now_s: float) -> None:
        self._next_arrival(now_s)
        self._applications.arrive(spec, now_s)

    def _begin_step(self, engine: _Engine, now_s: float) -> None:
        begin = time.perf_counter()
        batch = engine.scheduler.schedule(now_s)
        self._result.decision_s += time.perf_counter() - begin
        if not batch.chunks:
            engine.batch = None
            return
        engine.batch = batch
        for sequence in batch.admitted:
            if self._placement:
                self._placement.admitted(sequence.request_id)
            self._applications.started(sequence.request_id, sequence.cached_tokens or 0, now_s)
        step_s = self._step_time.predict(step_features(batch)) / 1000
        self.call_at(now_s + step_s, lambda now_s: self._end_step(engine, batch, now_s))

    def _end_step(self, engine: _Engine, batch: ScheduledBatch, now_s: float) -> None:
        self._result.num_steps += 1
        sampled: dict[str, list[int]] = {}
        for chunk in batch.chunks:
            request_id = chunk.sequence.request.request_id
            if chunk.samples and (found := self._requests.get(request_id)) is not None:
                num_outputs = chunk.sequence.num_outputs
                sampled[request_id] = [found[2] + num_outputs]
                if not num_outputs:
                    self._applications.first_token(request_id, now_s)
                    if self._placement:
                        self._placement.started(request_id)
        begin = time.perf_counter()
        finished = engine.scheduler.update(batch, sampled)
        self._result.decision_s += time.perf_counter() - begin
        engine.batch = None
        for sequence in finished:
            output_ids = sequence.token_ids[len(sequence.request.prompt_ids) :]
            del self._requests[sequence.request_id]
            if self._placement:
                self._placement.ended(sequence.request, output_ids)
            self._applications.finished(sequence.request_id, output_ids, now_s)
        if self._placement and finished:
            self._fill(engine, now_s)
        if engine.scheduler.has_work:
            self._idle_with_work[engine.number] = engine

    def _fill(self, engine: _Engine, now_s: float) -> None:
        """Give an engine where nobody waits calls that wait elsewhere, where that pays."""
        assert self._placement is not None
        for request_id, source, _ in self._placement.moves(engine.number):
            _, request, first_output = self._requests[request_id]
            self._engines[source].scheduler.abort(request_id)
            self._requests[request_id] = engine, request, first_output
            engine.scheduler.add(request, now_s)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of live objects, and hardly a cycle among them: collecting would only go through them all."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
