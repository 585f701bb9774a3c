"""A program's calls over time, as text for a terminal."""

from __future__ import annotations

from itertools import pairwise

from macaw.protocol import CallState, ProgramState

_AHEAD, _QUEUED, _PREFILL, _DECODE = "░", "·", "▒", "█"


def render_timeline(state: ProgramState, width: int = 100) -> str:
    """Draw one bar per call: prefilled ahead, waiting in the queue, prefilling, writing its answer.

    Args:
        state: From `MacawClient.get_program`.
        width: Columns of the whole picture, at least 40.

    Returns:
        Lines without a newline at the end. Calls on the critical path carry a ``*``.
    """
    calls = sorted(state.calls, key=lambda call: (call.timings.ready_ms or 0.0, call.depth))
    label_width = min(max((len(call.id) for call in calls), default=0) + 2, width // 3)
    columns = width - label_width - 12
    end = max([call.timings.completed_ms or 0.0 for call in calls] + [state.duration_ms, 1e-3])
    critical = set(state.critical_path)
    lines = [
        f"{'':{label_width}}0 ms{f'{end:,.0f} ms':>{columns - 4}}",
        *(_line(call, label_width, columns, end, call.id in critical) for call in calls),
        f"{'':{label_width}}{_AHEAD} prefilled ahead   {_QUEUED} queued   {_PREFILL} prefill   {_DECODE} decode   "
        "* critical path",
    ]
    return "\n".join(lines)


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
