"""What is told of a run: a table, Markdown, JSON; medians with the smallest and the largest value."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from macaw_server.bench.client import Burst
from macaw_server.bench.engine import Result

COLUMNS = ("case", "side", "tokens/s", "TTFT ms", "ITL p50 ms", "ITL p99 ms", "cached", "against peer", "of limit")
TABLE_WIDTH = 132
"""Characters; on a narrower console cells are cut."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)} - {_short(self.high)})"


@dataclass(frozen=True, slots=True)
class Summary:
    """One side of one case.

    Attributes:
        tokens_per_s: Output tokens of all requests over the time of all.
        ttft_ms: Median time to first token, from sending the burst.
        itl_p50_ms, itl_p99_ms: Of the gaps between text chunks, of all rounds together.
        cached_share: Of the prompt tokens, found in the cache by the server's own account.
        ratio: Tokens per second over those of the last side in the same round; of the last side None.
        limit_share: Of the machine's bound; None where that is not known.
    """

    case: str
    side: str
    tokens_per_s: Spread
    ttft_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    cached_share: float
    ratio: Spread | None
    limit_share: float | None


def summarize(result: Result, limit: float | None) -> list[Summary]:
    """Each side of a case; `limit` is the bound in tokens per second."""
    peer = list(result.bursts.values())[-1]
    return [
        _summarize(result, side, bursts, None if bursts is peer else peer, limit)
        for side, bursts in result.bursts.items()
    ]


def _summarize(
    result: Result, side: str, bursts: list[Burst], peer: list[Burst] | None, limit: float | None
) -> Summary:
    answers = [answer for burst in bursts for answer in burst.answers]
    gaps_ms = sorted(1000 * gap for answer in answers for gap in answer.gaps_s) or [0.0]
    rate = Spread.of([burst.tokens_per_s for burst in bursts])
    return Summary(
        case=result.case.name,
        side=side,
        tokens_per_s=rate,
        ttft_ms=1000 * statistics.median(answer.first_chunk_s for answer in answers),
        itl_p50_ms=statistics.median(gaps_ms),
        itl_p99_ms=gaps_ms[int(0.99 * (len(gaps_ms) - 1))],
        cached_share=statistics.mean(answer.cached_tokens for answer in answers) / result.case.prompt_len,
        ratio=_ratio(bursts, peer) if peer else None,
        limit_share=limit and rate.median / limit,
    )


def _ratio(bursts: list[Burst], peer: list[Burst]) -> Spread:
    return Spread.of([ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in zip(bursts, peer, strict=True)])


@dataclass(frozen=True, slots=True)
class Report:
    """All that a run has to say.

    Attributes:
        limits: Of each case by name, in tokens per second; empty where they are not known.
        facts: Command, commit, machine and the like.
    """

    results: list[Result]
    limits: dict[str, float]
    facts: dict[str, str]

    @property
    def summaries(self) -> list[Summary]:
        """Of each case and side, in the order of measuring."""
        return [s for result in self.results for s in summarize(result, self.limits.get(result.case.name))]

    def print(self, console: Console) -> None:
        """The table and the facts."""
        table = Table()
        for i, column in enumerate(COLUMNS):
            table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
        for summary in self.summaries:
            table.add_row(*_cells(summary), end_section=summary.ratio is None)
        console.print(table)
        for name, value in self.facts.items():
            console.print(f"{name:8} {value}", markup=False, soft_wrap=True)

    def as_markdown(self) -> str:
        """The table under the facts."""
        lines = [f"- {name}: {value}" for name, value in self.facts.items()]
        lines += ["", f"| {' | '.join(COLUMNS)} |", "|---|---" + "|--:" * (len(COLUMNS) - 2) + "|"]
        lines += [f"| {' | '.join(_cells(summary))} |" for summary in self.summaries]
        return "\n".join(lines) + "\n"

    def as_json(self) -> str:
        """Facts, limits, summaries, and every request of every round."""
        content = {
            "facts": self.facts,
            "limits": self.limits,
            "summaries": [asdict(summary) for summary in self.summaries],
            "results": [{"name": result.case.name, **asdict(result)} for result in self.results],
        }
        return json.dumps(content, indent=1)


def _cells(s: Summary) -> tuple[str, ...]:
    """In the order of `COLUMNS`."""
    return (
        s.case,
        s.side,
        str(s.tokens_per_s),
        _short(s.ttft_ms),
        _short(s.itl_p50_ms),
        _short(s.itl_p99_ms),
        f"{s.cached_share:.0%}",
        f"{s.ratio.median:.2f}x ({s.ratio.low:.2f} - {s.ratio.high:.2f})" if s.ratio else "",
        f"{s.limit_share:.0%}" if s.limit_share is not None else "",
    )


def _short(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
