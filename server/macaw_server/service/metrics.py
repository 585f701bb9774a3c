"""Prometheus metrics: what the service sees as it happens, and what its engines say when they are asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from macaw.protocol import CallCompleted, CallFailed, CallStarted, Event, ProgramCompleted, ProgramFailed
from macaw_server.engine.group import EngineGroup
from macaw_server.engine.types import EngineStats
from macaw_server.service.types import ServedModel

_ENGINE_COUNTERS = {
    "engine_steps": ("steps", "Steps of the engine."),
    "engine_restarts": ("restarts", "Times that the engine's process was started again."),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "cached_prompt_tokens": ("cached_tokens", "Prompt tokens that were found in the KV cache."),
    "computed_prompt_tokens": ("computed_tokens", "Prompt tokens that were computed."),
    "ahead_tokens": ("ahead_tokens", "Prompt tokens that were computed before their call was ready."),
    "output_tokens": ("output_tokens", "Tokens generated."),
    "draft_tokens": ("draft_tokens", "Tokens guessed by prompt lookup and verified."),
    "accepted_draft_tokens": ("accepted_tokens", "Guessed tokens that were right."),
    "preemptions": ("preemptions", "Requests taken out of the batch for want of pages."),
    "evicted_pages": ("evicted_pages", "Cached pages given up for others."),
    "engine_forward_seconds": ("forward_s", "Time in the model."),
    "engine_overhead_seconds": ("overhead_s", "Time of steps outside the model."),
}
_ENGINE_GAUGES = {
    "engine_waiting_requests": ("waiting", "Requests that wait for the batch."),
    "engine_running_requests": ("running", "Requests in the batch."),
    "kv_pages_used": ("pages_used", "Pages that requests hold."),
    "kv_pages_cached": ("pages_cached", "Pages that only the cache holds."),
    "kv_pages_total": ("pages_total", "Pages in the pool."),
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STATS_TIMEOUT_S = 2.0


class Metrics:
    """All metrics of one server, in a registry of their own.

    Attributes:
        registry: For the exposition.
        http_requests: Counts by route, method and status.
    """

    def __init__(self, num_programs: Callable[[], float], num_calls: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.http_requests = Counter(
            "macaw_http_requests",
            "HTTP requests answered.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self._programs = Counter("macaw_programs", "Programs that ended.", ["status"], registry=self.registry)
        self._calls = Counter("macaw_calls", "Calls that ended.", ["status"], registry=self.registry)
        self._ahead_used = Counter(
            "macaw_ahead_used_tokens",
            "Cached prompt tokens of calls that had been computed ahead.",
            registry=self.registry,
        )
        self._queue_time = self._histogram("queue_time", "From ready to the first batch.")
        self._first_token = self._histogram("time_to_first_token", "From ready to the first token.")
        self._duration = self._histogram("call_duration", "From ready to the whole answer.")
        live_programs = Gauge("macaw_live_programs", "Programs that have not ended.", registry=self.registry)
        live_programs.set_function(num_programs)
        live_calls = Gauge("macaw_live_calls", "Unfinished calls of these.", registry=self.registry)
        live_calls.set_function(num_calls)
        self._engines = _EngineCollector()
        self.registry.register(self._engines)

    def observe(self, event: Event) -> None:
        """Take note of a program's event."""
        match event:
            case CallStarted():
                self._queue_time.observe(event.queue_ms / 1000)
                self._ahead_used.inc(event.prefilled_ahead_tokens)
            case CallCompleted(timings=t):
                self._calls.labels("completed").inc()
                if t.ready_ms is not None and t.completed_ms is not None:
                    self._duration.observe((t.completed_ms - t.ready_ms) / 1000)
                if t.ready_ms is not None and t.first_token_ms is not None:
                    self._first_token.observe((t.first_token_ms - t.ready_ms) / 1000)
            case CallFailed():
                self._calls.labels(event.error.code).inc()
            case ProgramCompleted():
                self._programs.labels("completed").inc()
            case ProgramFailed():
                self._programs.labels(event.error.code).inc()

    async def refresh(self, models: Iterable[ServedModel]) -> None:
        """Ask the engines; of one that does not answer the last known numbers stay."""
        for model in models:
            self._engines.working[model.name] = model.engine.status == "running"
            try:
                async with asyncio.timeout(_STATS_TIMEOUT_S):
                    self._engines.stats[model.name] = await model.engine.stats()
                    if isinstance(model.engine, EngineGroup):
                        self._engines.members[model.name] = await model.engine.member_stats()
            except TimeoutError:
                continue

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"macaw_{name}_seconds", text, buckets=_SECONDS, registry=self.registry)


class _EngineCollector(Collector):
    """The engines' own counters, which live in their processes."""

    def __init__(self) -> None:
        self.stats: dict[str, EngineStats] = {}
        self.members: dict[str, list[EngineStats]] = {}
        self.working: dict[str, bool] = {}

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("macaw_engine_up", "Whether the engine works on requests.", labels=["model"])
        for model, working in self.working.items():
            up.add_metric([model], working)
        yield up
        step_time = GaugeMetricFamily(
            "macaw_step_time_ms", "Step-time model: milliseconds per step and per unit.", labels=["model", "term"]
        )
        for model, stats in self.stats.items():
            for term, value in stats.step_time_ms.items():
                step_time.add_metric([model, term], value)
        yield step_time
        for kind, table in ((CounterMetricFamily, _ENGINE_COUNTERS), (GaugeMetricFamily, _ENGINE_GAUGES)):
            for name, (field, text) in table.items():
                family = kind(f"macaw_{name}", text, labels=["model"])
                for model, stats in self.stats.items():
                    family.add_metric([model], getattr(stats, field))
                yield family
                if self.members:
                    yield self._of_members(kind, name, field, text)

    def _of_members(
        self, kind: type[CounterMetricFamily] | type[GaugeMetricFamily], name: str, field: str, text: str
    ) -> Metric:
        """The same for each engine of a group."""
        family = kind(f"macaw_member_{name}", text, labels=["model", "engine"])
        for model, members in self.members.items():
            for i, stats in enumerate(members):
                family.add_metric([model, str(i)], getattr(stats, field))
        return family
