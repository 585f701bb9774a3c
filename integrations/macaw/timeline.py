"""A program's calls over time: text for a terminal, a picture for a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from macaw.protocol import CallState, ProgramState

_AHEAD, _QUEUED, _PREFILL, _DECODE = "░", "·", "▒", "█"
_ROW, _LABEL_X, _BARS_WIDTH, _CHARACTER = 24, 16, 560, 7.4
_STYLE = """
.page{fill:#ffffff;stroke:#d0d7de}text{font-size:12px;font-family:Menlo,Consolas,monospace;fill:#1f2328}
.note{fill:#59636e}.line{stroke:#d0d7de}.queued{fill:#d0d7de}.prefill{fill:#d4a72c}.decode{fill:#0969da}
.ahead{fill:#d4a72c;fill-opacity:0.4}
.failed{fill:#cf222e}.critical{font-weight:bold}
@media (prefers-color-scheme:dark){.page{fill:#0d1117;stroke:#3d444d}text{fill:#f0f6fc}.note{fill:#b1bac4}
.line{stroke:#3d444d}.queued{fill:#3d444d}.decode{fill:#4493f8}.failed{fill:#f85149}}
"""


@dataclass(frozen=True, repr=False)
class Timeline:
    """When each call of a program waited, prefilled and wrote; `str` draws it, and so does a notebook."""

    state: ProgramState

    def __str__(self) -> str:
        return render_timeline(self.state)

    __repr__ = __str__

    def to_svg(self) -> str:
        """The timeline as a picture, on light and on dark pages."""
        return render_timeline_svg(self.state)

    def _repr_svg_(self) -> str:
        return self.to_svg()


def render_timeline(state: ProgramState, width: int = 100) -> str:
    """Draw one bar per call: prefilled ahead, waiting in the queue, prefilling, writing its answer.

    Args:
        state: From `MacawClient.get_program`.
        width: Columns of the whole picture, at least 40.

    Returns:
        Lines without a newline at the end. Calls on the critical path carry a ``*``.
    """
    calls, end = _in_order(state)
    label_width = min(max((len(call.id) for call in calls), default=0) + 2, width // 3)
    columns = width - label_width - 12
    critical = set(state.critical_path)
    lines = [
        f"{'':{label_width}}0 ms{f'{end:,.0f} ms':>{columns - 4}}",
        *(_line(call, label_width, columns, end, call.id in critical) for call in calls),
        f"{'':{label_width}}{_AHEAD} prefilled ahead   {_QUEUED} queued   {_PREFILL} prefill   {_DECODE} decode   "
        "* critical path",
    ]
    return "\n".join(lines)


def render_timeline_svg(state: ProgramState) -> str:
    """Draw one bar per call as SVG. Calls on the critical path are bold."""
    calls, end = _in_order(state)
    left = _LABEL_X + max((len(call.id) for call in calls), default=0) * _CHARACTER + 12
    width, height = left + _BARS_WIDTH + 96, (len(calls) + 2) * _ROW + 16
    scale = _BARS_WIDTH / end
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" style="max-width:100%" role="img">',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1}" rx="8"/>',
        f'<text class="note" x="{left:.1f}" y="20">0 ms</text>',
        f'<text class="note" x="{left + _BARS_WIDTH:.1f}" y="20" text-anchor="end">{end:,.0f} ms</text>',
        f'<path class="line" d="M{left:.1f},28V{height - 32}M{left + _BARS_WIDTH:.1f},28V{height - 32}"/>',
    ]
    for row, call in enumerate(calls):
        y = 32 + row * _ROW
        label = ' class="critical"' if call.id in state.critical_path else ""
        parts.append(f'<text{label} x="{_LABEL_X}" y="{y + 14}">{escape(call.id)}</text>')
        known = _marks(call, end)
        for (start, kind), (stop, _) in pairwise(known):
            parts.append(
                f'<rect class="{kind}" x="{left + start * scale:.1f}" y="{y + 3}" '
                f'width="{max((stop - start) * scale, 1):.1f}" height="{_ROW - 8}"/>'
            )
        if known:
            x = left + known[-1][0] * scale + 6
            kind = "failed" if call.status == "failed" else "note"
            parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y + 14}">{_spent(call)}</text>')
    x = left
    for kind in ("ahead", "queued", "prefill", "decode"):
        parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{height - 24}" width="12" height="12"/>')
        parts.append(f'<text class="note" x="{x + 18:.1f}" y="{height - 14}">{kind}</text>')
        x += 96
    parts.append(f'<text class="note critical" x="{x:.1f}" y="{height - 14}">bold: critical path</text>')
    return "\n".join([*parts, "</svg>"])


def _in_order(state: ProgramState) -> tuple[list[CallState], float]:
    """The calls as they became ready, and the end of the time axis in milliseconds."""
    calls = sorted(state.calls, key=lambda call: (call.timings.ready_ms or 0.0, call.depth))
    end = max([call.timings.completed_ms or 0.0 for call in calls] + [state.duration_ms, 1e-3])
    return calls, end


def _marks(call: CallState, end: float) -> list[tuple[float, str]]:
    """When each of the call's phases began, and when the last one ended; one that runs goes on to `end`."""
    t = call.timings
    marks = [
        (t.ahead_ms, "ahead"),
        (t.ready_ms, "queued"),
        (t.started_ms, "prefill"),
        (t.first_token_ms, "decode"),
        (t.completed_ms, ""),
    ]
    known = [(at, mark) for at, mark in marks if at is not None]
    return [*known, (end, "")] if known and t.completed_ms is None else known


def _spent(call: CallState) -> str:
    t = call.timings
    if t.completed_ms is None or t.ready_ms is None or call.status == "failed":
        return call.status
    return f"{t.completed_ms - t.ready_ms:,.0f} ms"


def _line(call: CallState, label_width: int, columns: int, end: float, critical: bool) -> str:
    t = call.timings
    bar = [" "] * columns
    marks = [
        (t.ahead_ms, _AHEAD),
        (t.ready_ms, _QUEUED),
        (t.started_ms, _PREFILL),
        (t.first_token_ms, _DECODE),
        (t.completed_ms, " "),
    ]
    known = [(at, mark) for at, mark in marks if at is not None]
    for (start, mark), (stop, _) in pairwise(known):
        first = min(int(start / end * columns), columns - 1)
        last = min(max(int(stop / end * columns), first + 1), columns)
        bar[first:last] = mark * (last - first)
    ended = t.completed_ms is not None and t.ready_ms is not None
    spent = f"{(t.completed_ms or 0) - (t.ready_ms or 0):,.0f} ms" if ended else call.status
    label = f"{'*' if critical else ' '}{call.id}"[:label_width]
    return f"{label:{label_width}}{''.join(bar)} {spent:>10}"
