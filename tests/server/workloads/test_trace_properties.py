"""Programs of any shape, written as a trace, read, and written again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from macaw_server.workloads import CallSpec, Output, Part, ProgramSpec, Text, read_trace, write_trace

TEXTS = st.builds(lambda key: Text(f"text{key}", 3 + 7 * key), st.integers(0, 8))


@st.composite
def calls_of_a_program(draw: st.DrawFn) -> tuple[CallSpec, ...]:
    """Calls that read, go on with, or only wait for answers of those before them."""
    calls: list[CallSpec] = []
    for i in range(draw(st.integers(1, 6))):
        parts: tuple[Part, ...] = tuple(draw(st.lists(TEXTS, min_size=1, max_size=3)))
        if calls and (made := draw(st.none() | st.sampled_from(calls))):
            parts = (*made.parts, Output(made.id), *parts)
        elif calls and draw(st.booleans()):
            parts = (*parts, Output(draw(st.sampled_from(calls)).id), *draw(st.lists(TEXTS, max_size=2)))
        after = tuple(
            draw(st.lists(st.sampled_from([call.id for call in calls]), max_size=2, unique=True)) if calls else ()
        )
        read = {part.call for part in parts if isinstance(part, Output)}
        gap_s = draw(st.integers(0, 2000)) / 1000 if calls else 0.0
        after = tuple(dep for dep in after if dep not in read)
        calls.append(CallSpec(f"call{i}", parts, draw(st.integers(1, 50)), after, gap_s))
    return tuple(calls)


@st.composite
def workloads(draw: st.DrawFn) -> list[ProgramSpec]:
    specs = []
    for i in range(draw(st.integers(1, 3))):
        calls = draw(calls_of_a_program())
        read = {dep for call in calls for dep in call.deps}
        specs.append(
            ProgramSpec(
                f"p{i}",
                draw(st.sampled_from(["chat", "agents"])),
                float(i),
                calls,
                tuple(call.id for call in calls if call.id not in read),
                draw(st.sampled_from(["latency", "throughput"])),
                draw(st.none() | st.integers(1, 9000).map(lambda ms: ms / 1000)),
                draw(st.sampled_from(["t0", "t1"])),
            )
        )
    return specs


def written(specs: list[ProgramSpec], block_size: int) -> tuple[str, list[ProgramSpec]]:
    """The trace, and what is read from it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        write_trace(specs, path, block_size)
        return path.read_text(), read_trace(path)


def lines(text: str) -> list[dict[str, Any]]:
    """Without an order of what a call waits for."""
    return [line | {"deps": set(line["deps"])} for line in map(json.loads, text.splitlines())]


@given(workloads(), st.sampled_from([4, 16, 512]))
@settings(max_examples=200)
def test_what_was_read_is_written_again(specs: list[ProgramSpec], block_size: int) -> None:
    text, read = written(specs, block_size)
    again, read_again = written(read, block_size)
    assert lines(again) == lines(text)
    assert written(read_again, block_size) == (again, read_again)
    for before, after in zip(specs, read, strict=True):
        assert after.prompt_lens() == before.prompt_lens()
        assert [(c.id, c.output_len, c.gap_s) for c in after.calls] == [
            (c.id, c.output_len, c.gap_s) for c in before.calls
        ]
        assert (after.app, after.tenant, after.deadline_s) == (before.app, before.tenant, before.deadline_s)
        assert (after.arrival_s, after.targets, after.objective) == (before.arrival_s, before.targets, before.objective)
