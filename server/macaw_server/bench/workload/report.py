"""How a run of workloads is told: tables, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from rich.console import Console
from rich.table import Table

from macaw_server.bench.report import Spread
from macaw_server.bench.workload.gains import Gain, switch_gains
from macaw_server.bench.workload.rates import RATE_COLUMNS, RateResult
from macaw_server.bench.workload.records import Run
from macaw_server.bench.workload.summary import AppSummary, summarize
from macaw_server.simulate.report import short

COLUMNS = (
    "app",
    "side",
    "latency s",
    "p90 s",
    "first token s",
    "ms/token",
    "requests",
    "computed",
    "cached",
    "gain",
)
GAINS = "Gain per switch: mean latency without it over that with everything on"


@dataclass(frozen=True, slots=True)
class CaseResult:
    """All rounds of one case.

    Attributes:
        workload: Its name.
        name: With its distance and load.
        rounds: Runs by side, the baseline's first.
        equal_share: Of the programs, whose answers were the same on all of Macaw's sides.
        series: The name without the load; empty where that is the workload's own.
        rate: Programs per second of the load, where one was given.
    """

    workload: str
    name: str
    rounds: dict[str, list[Run]]
    equal_share: float
    series: str = ""
    rate: float | None = None


@dataclass(frozen=True)
class WorkloadReport:
    """All that a run has to say.

    Attributes:
        results: By case, in the order of measuring.
        facts: Command, commit, machine and the like.
        slo_token_ms: Allowed latency per output token of a program; None: no goodput.
        rates: By case, the rates that the sides sustain, where they were searched.
    """

    results: list[CaseResult]
    facts: dict[str, str]
    slo_token_ms: float | None = None
    rates: list[RateResult] = field(default_factory=list)

    @cached_property
    def summaries(self) -> dict[str, list[AppSummary]]:
        """Of each case, by app and side."""
        return {result.name: summarize(result.rounds, self.slo_token_ms) for result in self.results}

    @property
    def ladders(self) -> dict[str, list[CaseResult]]:
        """Cases that differ in their load alone, at least two, by what they have in common."""
        series: dict[str, list[CaseResult]] = {}
        for result in self.results:
            if result.rate:
                series.setdefault(result.series, []).append(result)
        return {name: sorted(cases, key=lambda c: c.rate or 0.0) for name, cases in series.items() if len(cases) > 1}

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the table."""
        return (*COLUMNS, f"<= {self.slo_token_ms:g} ms/token") if self.slo_token_ms else COLUMNS

    def print(self, console: Console) -> None:
        """A table for each case, and the facts."""
        for result in self.results:
            table = Table(title=f"{result.name}: {result.equal_share:.0%} of the answers are the same on all sides")
            for i, column in enumerate(self.columns):
                table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
            summaries = self.summaries[result.name]
            for i, summary in enumerate(summaries):
                last = i + 1 == len(summaries) or summaries[i + 1].app != summary.app
                table.add_row(*self.cells(summary), end_section=last)
            print_whole(console, table)
            if gains := switch_gains(result.rounds):
                table = Table(title=GAINS)
                for i, column in enumerate(_gain_columns(gains)):
                    table.add_column(column, justify="left" if i < 1 else "right", no_wrap=True)
                for gain in gains:
                    table.add_row(*_gain_cells(gain))
                print_whole(console, table)
        for found in self.rates:
            table = Table(title=found.title)
            for column in RATE_COLUMNS:
                table.add_column(column, justify="left" if column == "side" else "right", no_wrap=True)
            for side in found.summaries:
                table.add_row(*found.cells(side))
            print_whole(console, table)
        for name, value in self.facts.items():
            console.print(f"{name:8} {value}", markup=False, soft_wrap=True)

    def as_markdown(self) -> str:
        """The facts, and a table for each case."""
        lines = [f"- {name}: `{value}`" for name, value in self.facts.items()]
        for result in self.results:
            lines += ["", f"### {result.name}", "", f"| {' | '.join(self.columns)} |"]
            lines.append("|---|---" + "|--:" * (len(self.columns) - 2) + "|")
            lines += [f"| {' | '.join(self.cells(summary))} |" for summary in self.summaries[result.name]]
            if gains := switch_gains(result.rounds):
                lines += ["", f"{GAINS}:", "", f"| {' | '.join(_gain_columns(gains))} |"]
                lines.append("|---" + "|--:" * len(gains[0].by_app) + "|")
                lines += [f"| {' | '.join(_gain_cells(gain))} |" for gain in gains]
        for found in self.rates:
            lines += ["", f"### {found.title}", "", f"| {' | '.join(RATE_COLUMNS)} |"]
            lines.append("|---" + "|--:" * (len(RATE_COLUMNS) - 1) + "|")
            lines += [f"| {' | '.join(found.cells(side))} |" for side in found.summaries]
        return "\n".join(lines) + "\n"

    def as_json(self) -> str:
        """Facts, summaries, every program of every round, and every rate that was tried."""
        cases = [
            {
                "name": result.name,
                "workload": result.workload,
                "equal_share": result.equal_share,
                "gains": [asdict(gain) for gain in switch_gains(result.rounds)],
                "summaries": [asdict(summary) for summary in self.summaries[result.name]],
                "rounds": {
                    side: [[outcome.as_json() for outcome in run.outcomes] for run in runs]
                    for side, runs in result.rounds.items()
                },
            }
            for result in self.results
        ]
        rates = [found.as_json() for found in self.rates]
        return json.dumps({"facts": self.facts, "cases": cases, "rates": rates}, indent=1)

    def cells(self, s: AppSummary) -> tuple[str, ...]:
        """In the order of the columns."""
        cells = (
            f"{s.app} ({s.num_programs})",
            s.side,
            str(s.latency_s),
            short(s.latency_p90_s),
            short(s.ttft_s),
            short(s.token_ms),
            short(s.num_requests),
            f"{s.computed_tokens:,}",
            f"{s.cached_share:.0%}",
            _gain(s.gain),
        )
        return cells if s.slo_share is None else (*cells, f"{s.slo_share:.0%}")


def _gain_columns(gains: Sequence[Gain]) -> tuple[str, ...]:
    return ("switch", *gains[0].by_app)


def _gain_cells(gain: Gain) -> tuple[str, ...]:
    return (gain.name, *map(_gain, gain.by_app.values()))


def print_whole(console: Console, table: Table) -> None:
    """In a console that is too narrow the terminal wraps the lines, and no cell is cut."""
    needed = table.__rich_measure__(console, console.options.update(max_width=1000)).maximum
    console.width = max(console.width, needed)
    console.print(table)


def _gain(gain: Spread | None) -> str:
    return f"{gain.median:.2f}x ({gain.low:.2f} - {gain.high:.2f})" if gain else ""
