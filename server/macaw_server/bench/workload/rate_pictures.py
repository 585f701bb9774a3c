"""Latency per output token at rising load, a line for each side, as the evaluations of vLLM and Parrot draw it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from macaw_server.bench.workload.probe import Probe
from macaw_server.bench.workload.rates import RateResult
from macaw_server.bench.workload.records import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Point(NamedTuple):
    """One rate.

    Attributes:
        rate: Programs per second.
        token_ms: Mean latency per output token.
        at_least: Programs were cut off, so that the latency is a lower bound.
    """

    rate: float
    token_ms: float
    at_least: bool = False


def draw_search(figure: Figure, result: RateResult) -> None:
    """Every rate that was tried, a line through the first round's, and each side's sustained rate."""
    axis: Any = figure.subplots()
    for summary in result.summaries:
        rounds = result.found[summary.side]
        label = f"{summary.side}: sustains {summary.rate.median:.3g}/s" if summary.rate.median else summary.side
        color = _draw(axis, label, _points(rounds[0].probes), [p for found in rounds for p in _points(found.probes)])
        if summary.rate.median:
            axis.axvline(summary.rate.median, color=color, linestyle=":", linewidth=1)
    slo = result.options.slo
    axis.scatter([], [], s=24, c="white", edgecolors="gray", label="not sustained, and cut off: at least")
    _latency(axis, slo.token_ms)
    axis.set(title=f"{result.name}: {slo.share:.0%} within {slo.token_ms:g} ms per output token")


def draw_ladder(
    figure: Figure, title: str, sides: Mapping[str, Sequence[tuple[float, list[Outcome]]]], slo_ms: float | None
) -> None:
    """By side, each rate of ``--rate R,R`` with its programs of all rounds; with an SLO also the share within it."""
    latency, *others = figure.subplots(1, 2 if slo_ms else 1, squeeze=False)[0]
    for side, rates in sides.items():
        points = [Point(rate, statistics.fmean(o.token_ms for o in outcomes)) for rate, outcomes in rates]
        _draw(latency, side, points, points)
        for axis in others:
            shares = [statistics.fmean(o.token_ms <= (slo_ms or 0) for o in outcomes) for _, outcomes in rates]
            axis.plot([rate for rate, _ in rates], shares, marker="o", markersize=5)
    _latency(latency, slo_ms)
    for axis in others:
        axis.set(ylabel=f"share of programs within {slo_ms:g} ms per output token", ylim=(0, 1.02))
        _rates(axis)
    figure.suptitle(title)


def _points(probes: Sequence[Probe]) -> list[Point]:
    return sorted(Point(p.rate, p.token_ms, p.cut_off) for p in probes if p.token_ms is not None)


def _draw(axis: Any, label: str, line: Sequence[Point], dots: Sequence[Point]) -> str:
    """A line through the means, and dots, hollow where latency is a lower bound; gives the colour."""
    rates = sorted({p.rate for p in line})
    means = [statistics.fmean(p.token_ms for p in line if p.rate == rate) for rate in rates]
    (drawn,) = axis.plot(rates, means, label=label)
    color: str = drawn.get_color()
    fills = ["white" if p.at_least else color for p in dots]
    axis.scatter([p.rate for p in dots], [p.token_ms for p in dots], s=24, c=fills, edgecolors=color, zorder=3)
    return color


def _latency(axis: Any, slo_ms: float | None) -> None:
    if slo_ms is not None:
        axis.axhline(slo_ms, color="black", linestyle="--", linewidth=1, label=f"allowed: {slo_ms:g} ms")
    axis.set(ylabel="mean ms per output token", yscale="log")
    _ticks(axis.yaxis)
    _rates(axis)
    axis.legend()


def _rates(axis: Any) -> None:
    axis.set(xlabel="programs per second", xscale="log")
    _ticks(axis.xaxis)
    axis.grid(alpha=0.3, which="both")


def _ticks(axis: Any) -> None:
    """As plain numbers, and few of them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
