from __future__ import annotations

from typing import Any

import pytest

from macaw.errors import CancelledError, DeadlineExceededError, InvalidProgramError, UpstreamFailedError
from macaw.protocol import CallTimings, ProgramGrowth, Target, Totals, Variable
from macaw_server.programs.dataflow import MAX_TRANSFORMED_CHARS
from macaw_server.programs.program import Program
from server.programs.builders import (
    BoomError,
    call,
    complete,
    completion,
    kinds,
    program,
    prompt,
    run,
    take,
    targets,
    transform,
)


def map_reduce(**fields: Any) -> Program:
    """Two documents, one call for each, joined for a last one."""
    return program(
        call("m0", "doc0"),
        call("m1", "doc1"),
        transform("join", "join", "m0.out", "m1.out", separator="+"),
        call("reduce", "join.out"),
        target="reduce.out",
        variables={"doc0": Variable(value="A"), "doc1": Variable(value="B")},
        **fields,
    )


def test_the_life_of_a_map_reduce() -> None:
    running = map_reduce()
    nodes = running.take_ready(1.0)
    assert [prompt(running, node) for node in nodes] == ["m0:A", "m1:B"]
    assert running.take_ready(1.0) == []

    assert kinds(running.call_started("m0", prompt_tokens=7, cached_tokens=3, now_ms=5.0)) == ["call.started m0"]
    assert kinds(running.call_delta("m0", {"n": 1}, 6.0)) == ["call.delta m0"]
    running.call_delta("m0", {"n": 2}, 7.0)
    finished = running.call_completed("m0", completion("one", 2), "one", 8.0)
    assert kinds(finished) == ["call.completed m0", "variable.resolved m0.out"]
    running.call_started("m1", prompt_tokens=7, cached_tokens=0, now_ms=5.0)
    finished = running.call_completed("m1", completion("two", 4), "two", 10.0)
    assert kinds(finished) == ["call.completed m1", "variable.resolved m1.out", "variable.resolved join.out"]

    (node,) = running.take_ready(10.0)
    assert prompt(running, node) == "reduce:one+two"
    running.call_started("reduce", prompt_tokens=9, cached_tokens=4, now_ms=13.0)
    finished = running.call_completed("reduce", completion("all", 1), "all", 20.0)
    assert kinds(finished) == ["call.completed reduce", "variable.resolved reduce.out", "program.completed"]

    end: Any = finished[-1]
    assert end.variables == {"reduce.out": "all"}
    assert end.critical_path == ["m1", "reduce"]
    assert end.duration_ms == 20.0
    assert end.totals == Totals(calls=3, prompt_tokens=23, cached_tokens=7, computed_tokens=16, completion_tokens=7)
    assert (running.status, running.ended, running.error) == ("completed", True, None)
    assert running.calls["m0"].timings == CallTimings(
        ready_ms=0.0, started_ms=5.0, first_token_ms=6.0, completed_ms=8.0
    )
    started: Any = next(event for event in running.events if event.type == "call.started")
    assert (started.queue_ms, started.prompt_tokens, started.cached_tokens) == (5.0, 7, 3)
    assert [event.sequence for event in running.events] == list(range(len(running.events)))
    assert running.events[0].type == "program.created"


@pytest.mark.parametrize(("deltas", "shown"), [("all", {"m0", "reduce"}), ("targets", {"reduce"}), ("none", set())])
def test_deltas_of_the_calls_that_the_client_shows(deltas: str, shown: set[str]) -> None:
    running = map_reduce(deltas=deltas)
    for name in ("m0", "m1", "reduce"):
        running.take_ready(1.0)
        running.call_started(name, prompt_tokens=7, cached_tokens=0, now_ms=2.0)
        if name != "m1":
            assert kinds(running.call_delta(name, {"n": 1}, 6.0)) == [f"call.delta {name}"] * (name in shown)
            assert running.calls[name].timings.first_token_ms == 6.0
        running.call_completed(name, completion("one", 2), "one", 8.0)
    assert {event.call_id for event in running.events if event.type == "call.delta"} == shown
    assert running.status == "completed"


def test_a_call_that_becomes_a_target_is_shown_from_then_on() -> None:
    growing = program(call("a"), target="a.out", open=True, deltas="targets")
    growing.grow(ProgramGrowth(calls=[call("b")]), 0.0)
    growing.take_ready(1.0)
    for name in ("a", "b"):
        growing.call_started(name, prompt_tokens=7, cached_tokens=0, now_ms=2.0)
    assert kinds(growing.call_delta("b", {}, 3.0)) == []
    growing.grow(ProgramGrowth(targets=targets("b.out")), 4.0)
    assert kinds(growing.call_delta("b", {}, 5.0)) == ["call.delta b"]


def test_taken_up_again_after_a_preemption_is_no_second_start() -> None:
    running = map_reduce()
    running.take_ready(0.0)
    running.call_started("m0", prompt_tokens=7, cached_tokens=3, now_ms=1.0)
    assert running.call_started("m0", prompt_tokens=7, cached_tokens=7, now_ms=2.0) == []
    assert running.calls["m0"].cached_tokens == 3


def test_max_concurrency() -> None:
    running = map_reduce(max_concurrency=1)
    assert take(running) == ["m0"]
    assert take(running) == []
    assert running.calls["m1"].status == "ready"
    complete(running, "m0")
    assert take(running) == ["m1"]
    assert running.running_calls() == ["m1"]


def test_transforms_of_given_values_run_at_once() -> None:
    stripped = program(
        transform("t", "strip", "a"), transform("u", "strip", "t.out"), target="u.out",
        variables={"a": Variable(value=" x ")},
    )  # fmt: skip
    assert kinds(stripped.events) == [
        "program.created",
        "variable.resolved t.out",
        "variable.resolved u.out",
        "program.completed",
    ]
    assert stripped.state(9.0).duration_ms == 0.0


def test_a_given_value_may_be_a_target() -> None:
    ended = program(target="a", variables={"a": Variable(value="x")})
    assert kinds(ended.events) == ["program.created", "program.completed"]
    assert ended.state(0.0).variables == {"a": "x"}
    assert ended.state(0.0).critical_path == []


def test_an_external_variable_starts_its_consumers() -> None:
    waiting = program(call("a", "x"), target="a.out", variables={"x": Variable(external=True)})
    assert take(waiting) == []
    assert kinds(waiting.set_variable("x", "v", 3.0)) == ["variable.resolved x"]
    assert waiting.calls["a"].timings.ready_ms == 3.0
    assert waiting.set_variable("x", "v", 4.0) == []  # the same again: a retry of the client
    assert [prompt(waiting, node) for node in waiting.take_ready(4.0)] == ["a:v"]


def test_a_failure_reaches_all_consumers_with_the_root_and_spares_other_branches() -> None:
    forked = program(
        call("bad"), call("good"), transform("t", "strip", "bad.out"),
        call("b", "t.out"), call("c", "b.out", "good.out"),
        target=targets("c.out", "good.out"),
    )  # fmt: skip
    take(forked)
    failed = forked.call_failed("bad", BoomError("it broke"), 5.0)
    assert kinds(failed) == ["call.failed bad", "call.failed b", "call.failed c"]
    errors: list[Any] = [event.error for event in failed if event.type == "call.failed"]  # type: ignore[attr-defined]
    assert [error.code for error in errors] == ["boom", "upstream_failed", "upstream_failed"]
    assert {error.message for error in errors[1:]} == {"Call 'bad' failed with boom: it broke"}
    assert not forked.ended

    finished = complete(forked, "good", "fine", 7.0)
    assert kinds(finished) == ["call.completed good", "variable.resolved good.out", "program.failed"]
    end: Any = finished[-1]
    assert (end.error.code, end.error.message) == ("upstream_failed", "Call 'bad' failed with boom: it broke")
    assert end.variables == {"good.out": "fine"}
    assert end.totals.calls == 4
    assert forked.calls["c"].timings.completed_ms == 5.0


def test_the_error_of_a_target_s_own_call_is_the_program_s() -> None:
    single = program(call("a"), target="a.out")
    take(single)
    error = BoomError("it broke", param="messages")
    assert kinds(single.call_failed("a", error, 1.0)) == ["call.failed a", "program.failed"]
    assert single.error is error
    assert single.state(1.0).error == single.events[-1].error  # type: ignore[union-attr]


def test_a_transform_that_cannot_be_applied_fails_its_consumers() -> None:
    parse = transform("parse", "json_pointer", "a.out", pointer="/x")
    chain = program(call("a"), parse, call("b", "parse.out"), target="b.out")
    take(chain)
    finished = complete(chain, "a", "no JSON")
    assert kinds(finished) == [
        "call.completed a",
        "variable.resolved a.out",
        "call.failed b",
        "program.failed",
    ]
    assert chain.error is not None
    assert chain.error.code == "upstream_failed"
    assert chain.error.message.startswith("Transform 'parse' (json_pointer) failed: not JSON")


def test_what_transforms_write_together_is_bounded() -> None:
    copies = [transform(f"t{i}", "lines", "text") for i in range(5)]
    text = Variable(value="x" * (MAX_TRANSFORMED_CHARS // 3))
    running = program(*copies, target=targets("t2.out", "t3.out"), variables={"text": text})
    assert running.status == "failed"
    assert sorted(running.state(0.0).variables) == ["t0.out", "t1.out", "t2.out"]
    assert isinstance(running.error, UpstreamFailedError)
    assert "limit of 33,554,432 characters" in running.error.message


def test_two_failed_inputs_fail_a_call_once() -> None:
    joined = program(call("a"), call("b"), call("c", "a.out", "b.out"), call("d"), target=targets("c.out", "d.out"))
    take(joined)
    assert kinds(joined.call_failed("a", BoomError("1"), 0.0)) == ["call.failed a", "call.failed c"]
    assert kinds(joined.call_failed("b", BoomError("2"), 0.0)) == ["call.failed b"]


def test_calls_that_nothing_waits_for_any_more_are_cancelled_at_the_end() -> None:
    joined = program(call("a"), call("b"), call("c", "a.out", "b.out"), target="c.out")
    take(joined)
    events = joined.call_failed("a", BoomError("1"), 4.0)
    assert kinds(events) == ["call.failed a", "call.failed c", "call.failed b", "program.failed"]
    assert joined.aborted_calls == ["b"]
    assert isinstance(joined.calls["b"].error, CancelledError)
    assert joined.running_calls() == []
    # what the engine reports before it hears of that changes nothing
    assert joined.call_started("b", prompt_tokens=1, cached_tokens=0, now_ms=5.0) == []
    assert joined.call_delta("b", {}, 5.0) == []
    assert complete(joined, "b") == []
    assert joined.call_failed("b", BoomError("2"), 5.0) == []
    assert joined.calls["b"].status == "failed"
    assert len(joined.events) == 5


def test_cancelling_ends_everything_that_is_unfinished() -> None:
    running = map_reduce()
    take(running)
    complete(running, "m0")
    late = DeadlineExceededError("Deadline of 5 ms passed.")
    events: list[Any] = running.cancel(late, 6.0)
    assert kinds(events) == ["call.failed m1", "call.failed reduce", "program.failed"]
    assert {event.error.code for event in events} == {"deadline_exceeded"}
    assert running.aborted_calls == ["m1"]
    assert (running.status, running.error) == ("failed", late)
    assert take(running) == []
    assert running.cancel(CancelledError("again"), 7.0) == []


def test_the_end_comes_when_the_last_target_is_there() -> None:
    two = program(call("a"), call("b"), target=targets("a.out", "b.out"))
    take(two)
    complete(two, "b", now_ms=1.0)
    assert not two.ended
    end: Any = complete(two, "a", now_ms=2.0)[-1]
    assert end.critical_path == ["a"]
    assert list(end.variables) == ["a.out", "b.out"]


def test_the_deadline_is_the_earliest_of_those_that_still_wait() -> None:
    wanted = [
        Target(variable="a.out", deadline_ms=10),
        Target(variable="b.out", deadline_ms=30),
        Target(variable="b.out", deadline_ms=20),
        Target(variable="c.out"),
    ]
    timed = program(call("a"), call("b"), call("c"), target=wanted)
    take(timed)
    assert timed.slack(lambda node: 0.0) == (10, 0)
    complete(timed, "a")
    assert timed.slack(lambda node: 0.0) == (20, 0)
    complete(timed, "b")
    assert timed.slack(lambda node: 0.0) is None


def test_slack_is_that_of_the_longest_path_of_what_is_unfinished() -> None:
    cost = {"a": 5.0, "b": 1.0, "c": 2.0, "lone": 40.0}
    wanted = [Target(variable="c.out", deadline_ms=100), Target(variable="lone.out", deadline_ms=120)]
    timed = program(call("a"), call("b"), call("c", "a.out", "b.out"), call("lone"), target=wanted)
    take(timed)

    def slack() -> tuple[float, float] | None:
        return timed.slack(lambda node: cost[node.call.id])

    assert slack() == (120, 40), "it leaves 80 ms, and the chain 93"
    complete(timed, "lone")
    assert slack() == (100, 7)
    complete(timed, "a")
    assert slack() == (100, 3)
    complete(timed, "b")
    assert slack() == (100, 2)


# ----------------------------------------------------------------------------------------------------
# Growth


def test_a_loop_of_growths() -> None:
    loop = program(call("t0"), target="t0.out", open=True)
    for turn in range(1, 4):
        assert run(loop) == [f"t{turn - 1}"]
        growth = ProgramGrowth(
            calls=[call(f"t{turn}", f"t{turn - 1}.out", f"tool{turn}")],
            variables={f"tool{turn}": Variable(value="ok")},
            targets=targets(f"t{turn}.out"),
            close=turn == 3,
        )
        assert loop.grow(growth, float(turn)) == []
    assert loop.calls["t3"].timings.ready_ms == 3.0
    assert run(loop) == ["t3"]
    end: Any = loop.events[-1]
    assert end.critical_path == ["t0", "t1", "t2", "t3"]
    assert end.totals.calls == 4


def test_an_open_program_runs_what_nothing_needs_yet_and_stays_alive() -> None:
    idle = program(call("a"), open=True)
    assert run(idle) == ["a"]
    assert not idle.ended
    assert kinds(idle.grow(ProgramGrowth(close=True), 5.0)) == ["program.completed"]
    assert idle.events[-1].variables == {}  # type: ignore[union-attr]


def test_closing_cancels_calls_that_no_target_needs() -> None:
    idle = program(call("a"), call("b"), target="a.out", open=True)
    take(idle)
    complete(idle, "a")
    assert kinds(idle.grow(ProgramGrowth(close=True), 5.0)) == ["call.failed b", "program.completed"]
    assert idle.aborted_calls == ["b"]


def test_growth_that_reads_a_failed_variable_fails_at_once() -> None:
    growing = program(call("a"), open=True)
    take(growing)
    growing.call_failed("a", BoomError("it broke"), 1.0)
    growth = ProgramGrowth(
        calls=[call("c", "t.out"), call("d")],
        transforms=[transform("t", "strip", "a.out")],
        targets=targets("c.out", "d.out"),
    )
    events: list[Any] = growing.grow(growth, 2.0)
    assert kinds(events) == ["call.failed c"]
    assert events[0].error.message == "Call 'a' failed with boom: it broke"
    assert take(growing) == ["d"]


def test_growth_that_adds_a_target_on_what_is_settled_and_closes_ends_the_program() -> None:
    growing = program(call("a"), open=True)
    run(growing)
    closing = ProgramGrowth(targets=targets("t.out"), transforms=[transform("t", "strip", "a.out")], close=True)
    assert kinds(growing.grow(closing, 2.0)) == ["variable.resolved t.out", "program.completed"]


@pytest.mark.parametrize("ended", [False, True])
def test_a_closed_or_ended_program_cannot_grow(ended: bool) -> None:
    running = map_reduce()
    if ended:
        run(running)
    with pytest.raises(InvalidProgramError) as caught:
        running.grow(ProgramGrowth(), 1.0)
    expected = "'p' has ended (completed) and cannot grow." if ended else "'p' is closed and cannot grow."
    assert expected in caught.value.message
    assert caught.value.code == "invalid_program"


# ----------------------------------------------------------------------------------------------------


def test_the_state_shows_the_graph_and_what_was_made_but_not_what_the_client_sent() -> None:
    running = map_reduce(metadata={"chain": "demo"}, model="m")
    running.take_ready(1.0)
    complete(running, "m0", "one", now_ms=4.0)
    state = running.state(5.0)
    assert (state.id, state.status, state.model, state.duration_ms) == ("p", "running", "m", 5.0)
    assert state.variables == {"m0.out": "one"}
    assert state.critical_path == []
    assert [(c.id, c.status, c.depth, c.group) for c in state.calls] == [
        ("m0", "completed", 0, "reduce"),
        ("m1", "running", 0, "reduce"),
        ("reduce", "waiting", 1, None),
    ]
    assert [c.inputs for c in state.calls] == [["doc0"], ["doc1"], ["join.out"]]
    assert state.calls[0].completion == completion("one")
    assert [t.id for t in state.transforms] == ["join"]
    assert state.metadata == {"chain": "demo"}
    assert type(state).model_validate_json(state.model_dump_json()) == state

    run(running)
    complete(running, "m1")
    run(running)
    assert running.state(99.0).critical_path == ["m1", "reduce"]
    assert running.state(99.0).duration_ms == 0.0
