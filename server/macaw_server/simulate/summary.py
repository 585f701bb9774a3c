"""From what happened to the numbers that are told."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from macaw_server.scheduler import StepFeatures, StepTimeModel
from macaw_server.simulate.records import ProgramRecord, RunResult
from macaw_server.simulate.virtual import SimulationConfig
from macaw_server.workloads import CallSpec, ProgramSpec


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of some values; NaN of none."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        """Nearest rank."""
        ordered = sorted(values)
        if not ordered:
            return cls(float("nan"), float("nan"), float("nan"))
        return cls(*(ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.9, 0.99)))


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """The programs of one app, or of one tenant.

    Attributes:
        num_programs: Those that ended, failed ones included.
        num_failed: Without an answer.
        latency_s: From arrival to the last target.
        slowdown: Latency over `alone_s`.
        ttft_ms: From ready to the first token, over all calls.
        token_ms: Latency of a call over its output tokens, over all calls.
        slo_share: Of the programs that met their deadline, or were slowed down by the allowed factor at most.
        output_tokens: Of all calls.
    """

    num_programs: int
    num_failed: int
    latency_s: Percentiles
    slowdown: Percentiles
    ttft_ms: Percentiles
    token_ms: Percentiles
    slo_share: float
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Summary:
    """One run.

    Attributes:
        policy: Its name.
        duration_s: From the first arrival to the last end.
        num_calls: That ended with an answer.
        tokens_per_s, calls_per_s, programs_per_s: Over the duration.
        hit_share: Of the prompt tokens, found in the cache.
        ideal_hit_share: The same for an infinite cache that knows every prompt when it is ready.
        fairness: Jain's index of the tenants' mean slowdowns: 1 is fair, 1/n is one tenant that pays for all.
        num_steps, num_preemptions, num_evicted_pages: Of all engines.
        apps, tenants: By name.
        us_per_call: Real microseconds that scheduling took per call (placement, order, admission, pages).
        wall_s: Real seconds that the simulation took.
    """

    policy: str
    duration_s: float
    num_calls: int
    tokens_per_s: float
    calls_per_s: float
    programs_per_s: float
    hit_share: float
    ideal_hit_share: float
    fairness: float
    num_steps: int
    num_preemptions: int
    num_evicted_pages: int
    all: GroupSummary
    apps: dict[str, GroupSummary]
    tenants: dict[str, GroupSummary]
    us_per_call: float
    wall_s: float


@dataclass(slots=True)
class _Group:
    programs: list[ProgramRecord] = field(default_factory=list)
    slowdowns: list[float] = field(default_factory=list)

    def summary(self, slo: float) -> GroupSummary:
        calls = [call for program in self.programs for call in program.calls.values() if call.ended_s]
        good = [(p, s) for p, s in zip(self.programs, self.slowdowns, strict=True) if p.error is None]
        met = sum(s <= slo if p.spec.deadline_s is None else p.latency_s <= p.spec.deadline_s for p, s in good)
        return GroupSummary(
            num_programs=len(self.programs),
            num_failed=len(self.programs) - len(good),
            latency_s=Percentiles.of(p.latency_s for p, _ in good),
            slowdown=Percentiles.of(s for _, s in good),
            ttft_ms=Percentiles.of(1000 * (c.first_token_s - c.ready_s) for c in calls),
            token_ms=Percentiles.of(1000 * (c.ended_s - c.ready_s) / c.output_len for c in calls),
            slo_share=met / len(self.programs) if self.programs else float("nan"),
            output_tokens=sum(c.output_len for c in calls),
        )


def summarize(result: RunResult, config: SimulationConfig, step_time: StepTimeModel, *, slo: float) -> Summary:
    """The numbers of a run; `slo` is the slowdown that is allowed to a program without a deadline."""
    everything = _Group()
    apps: dict[str, _Group] = defaultdict(_Group)
    tenants: dict[str, _Group] = defaultdict(_Group)
    for program in result.programs:
        slowdown = program.latency_s / alone_s(program.spec, config, step_time)
        for group in (everything, apps[program.spec.app], tenants[program.spec.tenant]):
            group.programs.append(program)
            group.slowdowns.append(slowdown)
    calls = [call for program in result.programs for call in program.calls.values() if call.ended_s]
    duration_s = max(result.duration_s, 1e-9)
    prompt_tokens = sum(call.prompt_len for call in calls) or 1
    return Summary(
        policy=config.policy,
        duration_s=result.duration_s,
        num_calls=len(calls),
        tokens_per_s=sum(call.output_len for call in calls) / duration_s,
        calls_per_s=len(calls) / duration_s,
        programs_per_s=len(result.programs) / duration_s,
        hit_share=sum(call.cached_tokens for call in calls) / prompt_tokens,
        ideal_hit_share=sum(call.shared_tokens for call in calls) / prompt_tokens,
        fairness=_jain([statistics.fmean(group.slowdowns) for group in tenants.values()]),
        num_steps=result.num_steps,
        num_preemptions=result.num_preemptions,
        num_evicted_pages=result.num_evicted_pages,
        all=everything.summary(slo),
        apps={name: group.summary(slo) for name, group in sorted(apps.items())},
        tenants={name: group.summary(slo) for name, group in sorted(tenants.items())},
        us_per_call=1e6 * result.decision_s / max(result.num_scheduled, 1),
        wall_s=result.wall_s,
    )


def alone_s(spec: ProgramSpec, config: SimulationConfig, step_time: StepTimeModel) -> float:
    """Latency of a program on idle engines with empty caches that do one thing at a time, client time included.

    That is its critical path, or the computation of all prompts on all engines if that takes longer.
    """
    prompt_lens, ends, prefill_s = spec.prompt_lens(), dict[str, float](), 0.0
    for call in spec.calls:
        begin_s = max((ends[dep] for dep in call.deps), default=0.0) + call.gap_s
        prefill_ms, decode_ms = _call_alone_ms(call, prompt_lens[call.id], config, step_time)
        ends[call.id] = begin_s + (prefill_ms + decode_ms) / 1000
        prefill_s += prefill_ms / 1000
    path_s = max(ends[target] for target in spec.targets)
    return max(path_s, prefill_s / config.num_engines) + config.rtt_s


def _call_alone_ms(
    call: CallSpec, prompt_len: int, config: SimulationConfig, step_time: StepTimeModel
) -> tuple[float, float]:
    """Of the prompt and of the answer."""
    prefill_ms, done = 0.0, 0
    while done < prompt_len:
        length = min(prompt_len - done, config.max_num_batched_tokens)
        prefill_ms += step_time.predict(StepFeatures().plus(done, length, num_samples=int(done + length == prompt_len)))
        done += length
    context = prompt_len + call.output_len // 2
    decode_ms = step_time.predict(StepFeatures().plus(context, 1, num_samples=1))
    return prefill_ms, (call.output_len - 1) * decode_ms


def _jain(values: Sequence[float]) -> float:
    """Jain's index (Jain, Chiu & Hawe, "A Quantitative Measure of Fairness", 1984)."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0
