"""Plots of a run, as PNG files and on one page that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from macaw_server.bench.errors import BenchError
from macaw_server.bench.workload.gain_pictures import draw_gains
from macaw_server.bench.workload.rate_pictures import draw_ladder, draw_search
from macaw_server.bench.workload.rates import RATE_COLUMNS
from macaw_server.bench.workload.report import CaseResult, WorkloadReport
from macaw_server.bench.workload.sides import MACAW, SWITCHES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,td:nth-child(2){text-align:left}img{max-width:100%}dt{font-weight:bold}"
)


def check_matplotlib() -> None:
    """Before anything is measured.

    Raises:
        BenchError: It is not installed.
    """
    if find_spec("matplotlib") is None:
        raise BenchError("Plots need matplotlib. Install macaw[bench], or leave out --out.")


def write_pictures(report: WorkloadReport, folder: Path) -> list[Path]:
    """Write a PNG file for each picture of each case, and ``index.html``; gives the files.

    The pictures: ``CASE-latency``, ``CASE-switches`` where there are any, ``CASE-rates`` of a search or a rising load.
    """
    from matplotlib.figure import Figure

    written: list[Path] = []

    def picture(case: str, kind: str, draw: Callable[[Figure], object]) -> str:
        """An element of the page; empty where `draw` gives False."""
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        if draw(figure) is False:
            return ""
        path = folder / f"{_file_name(case)}-{kind}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
        data = base64.b64encode(path.read_bytes()).decode()
        return f'<p><img src="data:image/png;base64,{data}" alt="{escape(f"{case}: {kind}")}"></p>'

    sections = []
    for result in report.results:
        images = picture(result.name, "latency", partial(_draw_latency, report=report, result=result))
        images += picture(result.name, "switches", partial(_draw_switches, report=report, result=result))
        sections.append(_section(report, result, images))
    for series, results in report.ladders.items():
        sides = {
            side: [(result.rate or 0.0, [o for run in result.rounds[side] for o in run.outcomes]) for result in results]
            for side in results[0].rounds
        }
        draw = partial(draw_ladder, title=f"{series}: rising load", sides=sides, slo_ms=report.slo_token_ms)
        sections.append(f"<h2>{escape(series)}: rising load</h2>{picture(series, 'rates', draw)}")
    for found in report.rates:
        table = _table(RATE_COLUMNS, [found.cells(summary) for summary in found.summaries])
        image = picture(found.name, "rates", partial(draw_search, result=found))
        sections.append(f"<h2>{escape(found.title)}</h2>{table}{image}")
    page = folder / "index.html"
    page.write_text(_page(report, sections), encoding="utf-8")
    return [*written, page]


def _file_name(case: str) -> str:
    return case.replace(", ", "-").replace(" ", "").replace("/", "-per-")


def _draw_latency(figure: Figure, report: WorkloadReport, result: CaseResult) -> bool:
    """The share of programs that had their answer after so many seconds, by app."""
    apps = next(iter(result.rounds.values()))[0].apps
    axes = figure.subplots(1, len(apps), squeeze=False)[0]
    for axis, app in zip(axes, apps, strict=True):
        for side in result.rounds:
            if side not in {each.name for each in SWITCHES.values()}:
                latencies = sorted(o.latency_s for run in result.rounds[side] for o in run.of(app))
                shares = [(i + 1) / len(latencies) for i in range(len(latencies))]
                axis.step(latencies, shares, where="post", label=side)
        axis.set(xlabel="seconds until the answer", ylabel="share of programs", title=app, ylim=(0, 1), xlim=(0, None))
        axis.legend()
    return True


def _draw_switches(figure: Figure, report: WorkloadReport, result: CaseResult) -> bool:
    return draw_gains(figure, result)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _section(report: WorkloadReport, result: CaseResult, images: str) -> str:
    table = _table(report.columns, [report.cells(summary) for summary in report.summaries[result.name]])
    timeline = result.rounds[MACAW.name][-1].timeline
    drawn = f"<h3>The slowest program of the last round</h3>{timeline}" if timeline else ""
    return f"<h2>{escape(result.name)}</h2>{table}{images}{drawn}"


def _page(report: WorkloadReport, sections: list[str]) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.facts.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>macaw bench</title><style>{_STYLE}</style>'
        f"<h1>macaw bench</h1><dl>{facts}</dl>{''.join(sections)}</html>\n"
    )
