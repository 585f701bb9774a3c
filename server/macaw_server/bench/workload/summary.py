"""From the runs of all sides to what is told of them; ratios are taken within a round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from macaw_server.bench.report import Spread
from macaw_server.bench.workload.records import Outcome, Run


@dataclass(frozen=True, slots=True)
class AppSummary:
    """One side's programs of one app, over all rounds.

    Attributes:
        app: Its name.
        side: Its name.
        num_programs: In each round.
        latency_s: Mean over the programs of a round: median, least and most over the rounds.
        latency_p50_s, latency_p90_s: Over the programs of all rounds.
        ttft_s: Median, from the arrival to the first token of a target.
        token_ms: Median latency over the program's output tokens.
        num_requests: For one program, mean.
        computed_tokens: Prompt tokens that were not in the cache, in one round.
        cached_share: Of the prompt tokens, found in the cache.
        gain: Mean latency of the first side over this one's, round by round; None of the first side.
        slo_share: Of the programs within the allowed latency per token; None where none was given.
    """

    app: str
    side: str
    num_programs: int
    latency_s: Spread
    latency_p50_s: float
    latency_p90_s: float
    ttft_s: float
    token_ms: float
    num_requests: float
    computed_tokens: int
    cached_share: float
    gain: Spread | None
    slo_share: float | None


def summarize(rounds: dict[str, list[Run]], slo_token_ms: float | None = None) -> list[AppSummary]:
    """Each app on each side; `rounds` has the runs of each side, the baseline's first."""
    first = next(iter(rounds.values()))
    return [
        _summarize(
            app, side, [run.of(app) for run in runs], [run.of(app) for run in first], runs is first, slo_token_ms
        )
        for app in first[0].apps
        for side, runs in rounds.items()
    ]


def _summarize(
    app: str,
    side: str,
    rounds: Sequence[Sequence[Outcome]],
    baseline: Sequence[Sequence[Outcome]],
    is_baseline: bool,
    slo_token_ms: float | None,
) -> AppSummary:
    everything = [outcome for outcomes in rounds for outcome in outcomes]
    latencies = sorted(outcome.latency_s for outcome in everything)
    means = [_mean(outcomes, lambda o: o.latency_s) for outcomes in rounds]
    base = [_mean(outcomes, lambda o: o.latency_s) for outcomes in baseline]
    prompt_tokens = sum(outcome.prompt_tokens for outcome in everything)
    cached_tokens = sum(outcome.cached_tokens for outcome in everything)
    return AppSummary(
        app=app,
        side=side,
        num_programs=len(rounds[0]),
        latency_s=Spread.of(means),
        latency_p50_s=latencies[len(latencies) // 2],
        latency_p90_s=latencies[math.ceil(0.9 * len(latencies)) - 1],
        ttft_s=statistics.median(outcome.first_token_s - outcome.spec.arrival_s for outcome in everything),
        token_ms=statistics.median(outcome.token_ms for outcome in everything),
        num_requests=_mean(everything, lambda o: float(o.num_requests)),
        computed_tokens=round((prompt_tokens - cached_tokens) / len(rounds)),
        cached_share=cached_tokens / max(1, prompt_tokens),
        gain=None if is_baseline else Spread.of([b / m for b, m in zip(base, means, strict=True)]),
        slo_share=slo_token_ms and _mean(everything, lambda o: float(o.token_ms <= slo_token_ms)),
    )


def _mean(outcomes: Sequence[Outcome], value: Callable[[Outcome], float]) -> float:
    return statistics.fmean(value(outcome) for outcome in outcomes)
