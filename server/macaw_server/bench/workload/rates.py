"""What is told of sustained rates: per side a rate, what it is over the baseline's, and what it was like there."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from macaw_server.bench.report import Spread
from macaw_server.bench.workload.sustain import Found, SearchOptions
from macaw_server.simulate.report import short

RATE_COLUMNS = (
    "side",
    "sustained /s",
    "gain",
    "not sustained /s",
    "within SLO",
    "ms/token",
    "p90",
    "first token s",
    "cached",
    "rates tried",
)


@dataclass(frozen=True, slots=True)
class RateSummary:
    """One side.

    Attributes:
        side: Its name.
        rate: Sustained programs per second: median, least and most over the rounds; 0 where none was.
        failed_rate: Median of the lowest rates that were not sustained; None where a round found none.
        gain: `rate` over the first side's, round by round; None of the first side, and where its rate is 0.
        within_share, token_ms, token_p90_ms, ttft_s, cached_share: At the sustained rates, median over the rounds;
            None where no rate was.
        num_probes: Rates tried in all rounds.
    """

    side: str
    rate: Spread
    failed_rate: float | None
    gain: Spread | None
    within_share: float | None
    token_ms: float | None
    token_p90_ms: float | None
    ttft_s: float | None
    cached_share: float | None
    num_probes: int


@dataclass(frozen=True, slots=True)
class RateResult:
    """All rounds of one search.

    Attributes:
        workload: Its name.
        name: With its distance.
        options: How rates were tried.
        found: By side, the baseline's first, round by round.
        equal_share: Of the programs that were compared before, whose answers were the same on all of Macaw's sides.
    """

    workload: str
    name: str
    options: SearchOptions
    found: dict[str, list[Found]]
    equal_share: float

    @property
    def title(self) -> str:
        """With the SLO."""
        slo = self.options.slo
        return f"{self.name}: sustained with {slo.share:.0%} of the programs within {slo.token_ms:g} ms/token"

    @property
    def summaries(self) -> list[RateSummary]:
        """Of each side."""
        first = next(iter(self.found.values()))
        return [_summarize(side, rounds, None if rounds is first else first) for side, rounds in self.found.items()]

    def cells(self, s: RateSummary) -> tuple[str, ...]:
        """In the order of `RATE_COLUMNS`."""
        return (
            s.side,
            str(s.rate) if s.rate.high else f"none from {short(self.options.floor)} on",
            f"{s.gain.median:.2f}x ({s.gain.low:.2f} - {s.gain.high:.2f})" if s.gain else "",
            "" if s.failed_rate is None else short(s.failed_rate),
            "" if s.within_share is None else f"{s.within_share:.0%}",
            "" if s.token_ms is None else short(s.token_ms),
            "" if s.token_p90_ms is None else short(s.token_p90_ms),
            "" if s.ttft_s is None else short(s.ttft_s),
            "" if s.cached_share is None else f"{s.cached_share:.0%}",
            str(s.num_probes),
        )

    def as_json(self) -> dict[str, Any]:
        """Summaries, and every rate that was tried."""
        return {
            "name": self.name,
            "workload": self.workload,
            "equal_share": self.equal_share,
            "slo": self.options.slo._asdict(),
            "probe_s": self.options.probe_s,
            "min_programs": self.options.min_programs,
            "summaries": [asdict(summary) for summary in self.summaries],
            "rounds": {side: [asdict(found) for found in rounds] for side, rounds in self.found.items()},
        }


def _summarize(side: str, rounds: list[Found], baseline: list[Found] | None) -> RateSummary:
    failed = [found.failed_rate for found in rounds if found.failed_rate is not None]
    known = baseline is not None and all(found.rate for found in baseline)
    best = [found.best for found in rounds if found.best is not None]
    return RateSummary(
        side=side,
        rate=Spread.of([found.rate for found in rounds]),
        failed_rate=statistics.median(failed) if len(failed) == len(rounds) else None,
        gain=Spread.of([f.rate / b.rate for f, b in zip(rounds, baseline, strict=True)])
        if baseline and known
        else None,
        within_share=_median([probe.num_within / probe.num_programs for probe in best]),
        token_ms=_median([probe.token_ms for probe in best]),
        token_p90_ms=_median([probe.token_p90_ms for probe in best]),
        ttft_s=_median([probe.ttft_s for probe in best]),
        cached_share=_median([probe.cached_share for probe in best]),
        num_probes=sum(len(found.probes) for found in rounds),
    )


def _median(values: list[float] | list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
