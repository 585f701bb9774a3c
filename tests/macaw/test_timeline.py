"""The timeline of a program in a terminal."""

from __future__ import annotations

import re
from typing import Any

import pytest

from macaw.protocol import CallState, CallTimings, ProgramState, Totals
from macaw.timeline import render_timeline, render_timeline_svg


def call(name: str, status: Any, *times: float) -> CallState:
    names = ("ready_ms", "started_ms", "first_token_ms", "completed_ms")
    return CallState(
        id=name,
        status=status,
        inputs=[],
        output=name,
        depth=0,
        timings=CallTimings(**dict(zip(names, times, strict=False))),
    )


def program(*calls: CallState, path: tuple[str, ...] = (), duration_ms: float = 100) -> ProgramState:
    return ProgramState(
        id="p",
        status="running",
        model="m",
        calls=list(calls),
        transforms=[],
        targets=[],
        variables={},
        critical_path=list(path),
        totals=Totals(),
        duration_ms=duration_ms,
        metadata={},
    )


def test_bars_are_where_the_times_are() -> None:
    state = program(
        call("late", "completed", 50, 50, 75, 100), call("early", "completed", 0, 25, 50, 75), path=("late",)
    )
    scale, early, late, legend = render_timeline(state, width=60).splitlines()
    assert scale.strip() == "0 ms" + " " * (len(scale.strip()) - 10) + "100 ms"
    bar_start = len("early") + 2
    columns = 60 - bar_start - 12
    quarter = columns // 4
    assert early[bar_start : bar_start + columns].rstrip() in (
        "·" * a + "▒" * b + "█" * c
        for a in (quarter, quarter + 1)
        for b in (quarter, quarter + 1)
        for c in (quarter, quarter + 1)
    )
    assert early.endswith("75 ms")
    assert late.startswith("*late")
    assert late[bar_start : bar_start + columns].index("▒") == columns // 2
    assert "· queued" in legend


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_fit_whatever_the_state(width: int) -> None:
    state = program(
        call("a-name-that-is-far-too-long-for-its-column" * 2, "running", 1, 2, 3),
        call("waiting", "waiting"),
        call("instant", "completed", 5, 5, 5, 5),
        call("over", "completed", 0, 1, 2, 5000),
        duration_ms=0,
    )
    lines = render_timeline(state, width=width).splitlines()
    assert len(lines) == 6
    assert all(len(line) <= width for line in lines[:-1])
    assert any(line.endswith("waiting") for line in lines)
    assert any(line.endswith("running") for line in lines)


def test_a_program_without_calls() -> None:
    assert "0 ms" in render_timeline(program())


def test_what_was_prefilled_ahead_is_drawn() -> None:
    state = program(call("draft", "completed", 0, 10, 20, 80), call("polish", "completed", 80, 81, 85, 100))
    assert ["░" in row for row in render_timeline(state).splitlines()[1:3]] == [False, False]
    assert not re.search(r'class="ahead" x="\S+" y="59"', render_timeline_svg(state))
    state.calls[1].timings.ahead_ms = 20
    assert ["░" in row for row in render_timeline(state).splitlines()[1:3]] == [False, True]
    [bar] = re.findall(r'class="ahead" x="(\S+)" y="59" width="(\S+)"', render_timeline_svg(state))
    [queued] = re.findall(r'class="queued" x="(\S+)" y="59"', render_timeline_svg(state))
    assert float(bar[0]) + float(bar[1]) == pytest.approx(float(queued))
