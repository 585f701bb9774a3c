"""Plots of a run, as PNG files and on one page that needs nothing else."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from macaw_server.bench.errors import BenchError
from macaw_server.bench.workload.gain_pictures import draw_gains
from macaw_server.bench.workload.report import CaseResult, WorkloadReport
from macaw_server.bench.workload.sides import MACAW, SWITCHES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,td:nth-child(2){text-align:left}img{max-width:100%}dt{font-weight:bold}"
)


def write_pictures(report: WorkloadReport, folder: Path) -> list[Path]:
    """Write ``CASE-latency.png`` and ``CASE-switches.png`` for each case and ``index.html``; gives the files.

    Raises:
        BenchError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise BenchError("Plots need matplotlib. Install macaw[bench], or leave out --out.") from e
    written, sections = [], []
    for result in report.results:
        images = []
        for kind, draw in (("latency", _draw_latency), ("switches", _draw_switches)):
            figure = Figure(figsize=(8, 4), layout="constrained")
            if not draw(figure, report, result):
                continue
            path = folder / f"{_file_name(result.name)}-{kind}.png"
            figure.savefig(path, dpi=120)
            images.append(base64.b64encode(path.read_bytes()).decode())
            written.append(path)
        sections.append(_section(report, result, images))
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


def _section(report: WorkloadReport, result: CaseResult, images: list[str]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in report.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in report.cells(summary)) + "</tr>"
        for summary in report.summaries[result.name]
    )
    pictures = "".join(f'<p><img src="data:image/png;base64,{image}" alt=""></p>' for image in images)
    timeline = result.rounds[MACAW.name][-1].timeline
    drawn = f"<h3>The slowest program of the last round</h3>{timeline}" if timeline else ""
    return f"<h2>{escape(result.name)}</h2><table><tr>{head}</tr>{rows}</table>{pictures}{drawn}"


def _page(report: WorkloadReport, sections: list[str]) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.facts.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>macaw bench</title><style>{_STYLE}</style>'
        f"<h1>macaw bench</h1><dl>{facts}</dl>{''.join(sections)}</html>\n"
    )
