"""The same applications on a real engine in this process, by the wall clock: what the simulator is held against."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.types import EngineOutput, EngineRequest, SamplingParams
from macaw_server.simulate.applications import Applications
from macaw_server.simulate.records import ProgramRecord, RunResult
from macaw_server.simulate.tokens import VocabularyTokens
from macaw_server.simulate.virtual import Client, SimulationConfig
from macaw_server.workloads import ProgramSpec


class RealRun:
    """One run on an engine that has nothing else to do.

    Args:
        core: A loaded engine.
        programs: In order of arrival.
        client: Whether clients send programs, or each call by itself.
        rtt_s: Round trip between client and server, waited for.
    """

    def __init__(
        self, core: EngineCore, programs: Iterable[ProgramSpec], *, client: Client = "programs", rtt_s: float = 0.0
    ) -> None:
        self._core = core
        self._programs = list(programs)
        tokens = VocabularyTokens(range(min(100, core.info.vocab_size // 2), core.info.vocab_size))
        self._applications = Applications(tokens, self, as_requests=client == "requests", rtt_s=rtt_s)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_events = itertools.count()
        self._outputs: dict[str, list[int]] = {}
        self._result = RunResult()
        self._epoch_s = 0.0

    def run(self) -> RunResult:
        """Until all programs have ended."""
        before = self._core.stats()
        for spec in self._programs:
            self.call_at(spec.arrival_s, lambda now_s, spec=spec: self._applications.arrive(spec, now_s))  # type: ignore[misc]
        begin, self._epoch_s = time.perf_counter(), time.monotonic()
        while self._events or self._core.has_work:
            now_s = time.perf_counter() - begin
            while self._events and self._events[0][0] <= now_s:
                heapq.heappop(self._events)[2](now_s)
            if self._core.has_work:
                outputs = self._core.step()
                self._report(outputs, now_s, time.perf_counter() - begin)
            elif self._events:
                time.sleep(max(0.0, self._events[0][0] - (time.perf_counter() - begin)))
        after = self._core.stats()
        self._result.num_steps = after.steps - before.steps
        self._result.num_preemptions = after.preemptions - before.preemptions
        self._result.num_evicted_pages = after.evicted_pages - before.evicted_pages
        self._result.wall_s = time.perf_counter() - begin
        return self._result

    def submit(self, request: EngineRequest, now_s: float) -> None:
        """Queue a request, with its times on the engine's clock."""
        hints, epoch_s = request.hints, self._epoch_s
        request.hints = replace(hints, arrival_s=hints.arrival_s + epoch_s, deadline_s=hints.deadline_s + epoch_s)
        refused = self._core.add(request)
        if refused is not None and refused.error is not None:
            raise ValueError(refused.error[1])
        self._result.num_scheduled += 1
        self._outputs[request.request_id] = []

    def abort(self, request_id: str) -> None:
        """Forget a request."""
        self._core.abort([request_id], keep_pages=False)
        self._outputs.pop(request_id, None)

    def let_go(self, program_id: str) -> None:
        """Keep no pages for a program any more."""
        self._core.let_go([program_id])

    def call_at(self, time_s: float, action: Callable[[float], None]) -> None:
        """Call back when the time has come, between two steps."""
        heapq.heappush(self._events, (time_s, next(self._num_events), action))

    def on_end(self, record: ProgramRecord) -> None:
        """Keep the record."""
        self._result.programs.append(record)
        self._result.duration_s = max(self._result.duration_s, record.ended_s)

    def _report(self, outputs: list[EngineOutput], begin_s: float, end_s: float) -> None:
        for output in outputs:
            request_id, token_ids = output.request_id, self._outputs.get(output.request_id)
            if token_ids is None:
                continue
            if output.error is not None:
                raise RuntimeError(f"The engine failed on {request_id}: {output.error[1]}")
            if output.cached_tokens is not None:
                self._applications.started(request_id, output.cached_tokens, begin_s)
            if output.token_ids and not token_ids:
                self._applications.first_token(request_id, end_s)
            token_ids += output.token_ids
            if output.finish_reason is not None:
                self._applications.finished(request_id, self._outputs.pop(request_id), end_s)


def warm_up(core: EngineCore) -> None:
    """Let everything happen that happens once."""
    for i in range(2):
        prompt = list(range(100 + i, 100 + i + min(64, core.info.max_model_len // 2)))
        core.add(EngineRequest(f"warm-up-{i}", prompt, SamplingParams(max_tokens=8, temperature=0.0)))
    while core.has_work:
        core.step()


def config_of(core: EngineCore, engine: EngineConfig) -> SimulationConfig:
    """The simulated counterpart of a real engine."""
    return SimulationConfig(
        policy=engine.policy,
        num_pages=core.info.num_pages,
        page_size=core.info.page_size,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_model_len=core.info.max_model_len,
        latency_slowdown=engine.latency_slowdown,
        eviction=engine.eviction,
        prefix_caching=engine.prefix_caching,
        single_flight=engine.single_flight,
        task_groups=engine.task_groups,
    )
