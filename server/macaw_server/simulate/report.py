"""How a simulation is told: a table with a column for each policy, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from macaw_server.simulate.summary import GroupSummary, Percentiles, Summary


def print_report(console: Console, summaries: Sequence[Summary], facts: dict[str, str], *, slo: float) -> None:
    """The table, then what it is about."""
    table = Table()
    table.add_column("")
    for summary in summaries:
        table.add_column(summary.policy, justify="right")

    def row(name: str, cells: Sequence[str], *, end: bool = False) -> None:
        table.add_row(name, *cells, end_section=end)

    row("duration", [f"{short(s.duration_s)} s" for s in summaries])
    row("output tokens/s", [short(s.tokens_per_s) for s in summaries])
    row("calls/s", [short(s.calls_per_s) for s in summaries])
    row("prefix hits", [f"{s.hit_share:.1%}" for s in summaries])
    row("  with an infinite cache", [f"{s.ideal_hit_share:.1%}" for s in summaries])
    row("preemptions / evicted pages", [f"{s.num_preemptions:,} / {s.num_evicted_pages:,}" for s in summaries])
    row("fairness between tenants (Jain)", [f"{s.fairness:.3f}" for s in summaries], end=True)
    _group_rows(row, "all programs", [s.all for s in summaries], slo)
    apps = list(summaries[0].apps)
    for app in apps if len(apps) > 1 else ():
        _group_rows(row, app, [s.apps[app] for s in summaries], slo)
    tenants = list(summaries[0].tenants)
    for tenant in tenants if len(tenants) > 1 else ():
        _group_rows(row, f"tenant {tenant}", [s.tenants[tenant] for s in summaries], slo)
    row("scheduling, us/call", [short(s.us_per_call) for s in summaries])
    row("simulated in", [f"{short(s.wall_s)} s" for s in summaries])
    console.print(table)
    for name, value in facts.items():
        console.print(f"{name:10} {value}", markup=False, soft_wrap=True)


def _group_rows(row: object, name: str, groups: Sequence[GroupSummary], slo: float) -> None:
    assert callable(row)
    row(f"{name}: {groups[0].num_programs:,}", [f"{g.num_failed:,} failed" if g.num_failed else "" for g in groups])
    row("  latency s, p50 / p90 / p99", [_cells(g.latency_s) for g in groups])
    row("  slowdown, p50 / p90 / p99", [_cells(g.slowdown) for g in groups])
    row("  time to first token ms", [_cells(g.ttft_ms) for g in groups])
    row("  call latency per token ms", [_cells(g.token_ms) for g in groups])
    row(f"  deadline, or slowdown <= {slo:g}", [f"{g.slo_share:.1%}" for g in groups], end=True)


def as_json(summaries: Sequence[Summary], facts: dict[str, str]) -> str:
    """Facts and summaries; what depends on the machine that simulates is `us_per_call` and `wall_s` only."""
    return json.dumps({"facts": facts, "runs": [asdict(summary) for summary in summaries]}, indent=1)


def _cells(values: Percentiles) -> str:
    return f"{short(values.p50)} / {short(values.p90)} / {short(values.p99)}"


def short(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
