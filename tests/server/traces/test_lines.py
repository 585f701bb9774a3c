"""What calls have waited for, and how they are named and numbered, from made-up events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from macaw.protocol import TracedCall
from macaw_server.traces.lines import MAX_GAP_MS, TraceLines
from macaw_server.workloads import Output, ProgramSpec, read_trace


def call(node: str, ready_ms: float, ended_ms: float, **fields: Any) -> TracedCall:
    """A call of 20 tokens that answers 30."""
    defaults: dict[str, Any] = {
        "program": "app-1",
        "kind": "application",
        "arrival_ms": ready_ms,
        "deps": [],
        "prompt_tokens": 20,
        "cached_tokens": 16,
        "output_tokens": [30],
        "blocks": [900, 901],
        "answer": [],
        "objective": "latency",
    }
    return TracedCall(**{**defaults, "node": node, "ready_ms": ready_ms, "ended_ms": ended_ms, **fields})


def lines(*calls: TracedCall, start_ms: float = 0.0) -> list[dict[str, Any]]:
    trace = TraceLines(16)
    return [line for each in sorted(calls, key=lambda c: c.ended_ms) for line in trace.add("tenant", each, start_ms)]


def specs(path: Path, *calls: TracedCall) -> list[ProgramSpec]:
    path.write_text("\n".join(map(json.dumps, lines(*calls))))
    return read_trace(path)


def deps(*calls: TracedCall) -> dict[str, tuple[list[str], float | None]]:
    """Of each line: what it waits for, and its gap."""
    return {line["node"]: (line["deps"], line.get("gap_ms")) for line in lines(*calls)}


def test_a_loop_waits_for_its_last_answer() -> None:
    found = deps(call("a", 0, 10), call("b", 15, 20), call("c", 20.5, 30))
    assert found == {"call0": ([], None), "call1": (["call0"], 5), "call2": (["call1"], 0.5)}


def test_what_follows_a_group_waits_for_all_of_it() -> None:
    found = deps(call("a", 0, 10), call("b", 1, 13), call("c", 2, 12), call("d", 15, 20))
    assert found["call3"] == (["call0", "call1", "call2"], 2)
    assert all(found[name] == ([], None) for name in ("call0", "call1", "call2"))


def test_what_came_while_another_ran_has_not_waited_for_it() -> None:
    # b and c began behind a; c ends last, and was there before b had ended.
    found = deps(call("a", 0, 10), call("b", 12, 14), call("c", 13, 30), call("d", 31, 40))
    assert found == {
        "call0": ([], None),
        "call1": (["call0"], 2),
        "call2": (["call0"], 3),
        "call3": (["call1", "call2"], 1),
    }


def test_the_graph_has_the_first_word() -> None:
    own = {"program": "prog-1", "kind": "program"}
    found = deps(
        call("a", 0, 10, **own),
        call("b", 0, 12, **own),
        call("c", 15, 20, deps=["a"], **own),
        call("late", 25, 30, deps=["unrecorded"], **own),
    )
    assert found == {"a": ([], None), "b": ([], None), "c": (["a"], 5), "late": (["c"], 5)}


def test_choices_are_calls_and_are_waited_for_together() -> None:
    own = {"program": "prog-1", "kind": "program"}
    first, second, then = lines(
        call("a", 0, 10, output_tokens=[3, 0], answer=[7], **own), call("b", 10, 20, deps=["a"], **own)
    )
    assert (first["node"], first["output_length"], first["answer_ids"]) == ("a", 3, [2])
    assert (second["node"], second["output_length"]) == ("a/choice1", 1)  # a trace has no answers of no token
    assert "answer_ids" not in second
    assert (then["deps"], then["gap_ms"]) == (["a", "a/choice1"], 0)


def test_a_conversation_of_plain_requests_is_a_program(tmp_path: Path) -> None:
    plain = {"kind": "request", "app": None}
    first = call("prog-1/0", 0, 10, program="prog-1", answer=[501, 502], **plain)
    blocks = [900, 501, 502, 503]
    second = call("prog-2/0", 500, 600, program="prog-2", prompt_tokens=64, blocks=blocks, **plain)
    other = call("prog-3/0", 700, 800, program="prog-3", **plain)
    chat, alone = specs(tmp_path / "trace", first, second, other)
    assert [(c.id, c.deps, c.gap_s) for c in chat.calls] == [("call0", (), 0.0), ("call1", ("call0",), 0.49)]
    assert Output("call0") in chat.calls[1].parts
    assert len(alone.calls) == 1


@pytest.mark.parametrize(("pause_ms", "num_programs"), [(MAX_GAP_MS, 1), (MAX_GAP_MS + 1, 2)])
def test_after_a_long_pause_an_application_is_another(pause_ms: float, num_programs: int, tmp_path: Path) -> None:
    late = call("b", 10 + pause_ms, 20 + pause_ms)
    found = specs(tmp_path / "trace", call("a", 0, 10), late, call("c", 21 + pause_ms, 30 + pause_ms))
    assert len(found) == num_programs
    assert len(found[-1].calls) == 3 - (num_programs - 1)


@pytest.mark.parametrize(
    ("kind", "app", "name"),
    [
        ("application", "run-17", "run"),
        ("application", "0f9a3c51-2f3e-4f6b-9d5e-1c2d3e4f5a6b", "applications"),
        ("application", "reviewer/0123456789abcdef0123", "reviewer"),
        ("application", "feedback", "feedback"),
        ("program", "RunnableSequence", "RunnableSequence"),
        ("program", None, "programs"),
        ("request", None, "requests"),
    ],
)
def test_names_of_apps(kind: str, app: str | None, name: str) -> None:
    assert lines(call("a", 0, 1, kind=kind, app=app))[0]["app"] == name


def test_times_count_from_the_recording_and_deadlines_from_the_first_call() -> None:
    [line] = lines(call("a", 250, 300, arrival_ms=150, deadline_ms=1000), start_ms=200)
    assert (line["timestamp"], line["deadline_ms"]) == (50, 900)
    [early] = lines(call("a", 190, 300), start_ms=200)
    assert early["timestamp"] == 0


def test_numbers_and_tenants_are_told_apart() -> None:
    trace = TraceLines(16)
    [of_one] = trace.add("one", call("a", 0, 1), 0.0)
    [of_other] = trace.add("other", call("a", 0, 1), 0.0)
    assert (of_one["tenant"], of_other["tenant"]) == ("t0", "t1")
    assert (of_one["hash_ids"], of_other["hash_ids"]) == ([0, 1], [2, 3])
    assert (of_one["program_id"], of_other["program_id"]) == ("p0", "p1")
    assert trace.totals.num_programs == 2
