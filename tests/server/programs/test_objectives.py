from __future__ import annotations

import math

from macaw.protocol import ProgramGrowth, Target
from macaw_server.engine.types import CallClass
from macaw_server.programs.program import Program
from server.programs.builders import call, program, targets, transform

LATENCY, GROUP, BACKGROUND = CallClass.LATENCY, CallClass.GROUP, CallClass.BACKGROUND


def deduced(program: Program) -> dict[str, tuple[CallClass, str | None, int]]:
    return {name: (node.call_class, node.group, node.depth) for name, node in program.calls.items()}


def test_a_chain_inherits_latency() -> None:
    chain = program(call("c", "b.out"), call("a"), call("b", "a.out"), target="c.out")
    assert deduced(chain) == {"a": (LATENCY, None, 0), "b": (LATENCY, None, 1), "c": (LATENCY, None, 2)}


def test_throughput_is_background() -> None:
    chain = program(call("a"), call("b", "a.out"), target=targets("b.out", objective="throughput"))
    assert deduced(chain) == {"a": (BACKGROUND, None, 0), "b": (BACKGROUND, None, 1)}


def test_siblings_are_a_group_and_their_consumer_is_latency_critical() -> None:
    map_reduce = program(call("m0"), call("m1"), call("reduce", "m0.out", "m1.out"), target="reduce.out")
    assert deduced(map_reduce) == {
        "m0": (GROUP, "reduce", 0),
        "m1": (GROUP, "reduce", 0),
        "reduce": (LATENCY, None, 1),
    }


def test_siblings_through_a_transform() -> None:
    join = transform("join", "join", "m0.out", "m1.out")
    map_reduce = program(call("m0"), call("m1"), join, call("reduce", "join.out"), target="reduce.out")
    assert deduced(map_reduce)["m0"] == (GROUP, "reduce", 0)
    assert deduced(map_reduce)["reduce"] == (LATENCY, None, 1)


def test_a_transform_that_makes_the_target_is_the_consumer() -> None:
    fan_out = program(call("m0"), call("m1"), transform("join", "join", "m0.out", "m1.out"), target="join.out")
    assert deduced(fan_out) == {"m0": (GROUP, "join", 0), "m1": (GROUP, "join", 0)}


def test_siblings_for_throughput_are_a_group_in_the_background() -> None:
    fan_out = program(
        call("m0"), call("m1"), call("r", "m0.out", "m1.out"), target=targets("r.out", objective="throughput")
    )
    assert deduced(fan_out)["m0"] == (BACKGROUND, "r", 0)


def test_one_feeds_the_other_so_they_are_no_siblings() -> None:
    refine = program(call("a"), call("b", "a.out"), call("c", "a.out", "b.out"), target="c.out")
    assert deduced(refine) == {"a": (LATENCY, None, 0), "b": (LATENCY, None, 1), "c": (LATENCY, None, 2)}


def test_a_whole_branch_belongs_to_the_group_and_what_comes_before_all_branches_does_not() -> None:
    steps = [call("plan"), call("reduce", "code0.out", "code1.out")]
    for i in range(2):
        steps += [call(f"design{i}", "plan.out"), call(f"code{i}", f"design{i}.out")]
    assert deduced(program(*steps, target="reduce.out")) == {
        "plan": (LATENCY, None, 0),
        "design0": (GROUP, "reduce", 1),
        "design1": (GROUP, "reduce", 1),
        "code0": (GROUP, "reduce", 2),
        "code1": (GROUP, "reduce", 2),
        "reduce": (LATENCY, None, 3),
    }


def test_the_strictest_objective_wins() -> None:
    wanted = [Target(variable="m0.out"), Target(variable="r.out", objective="throughput")]
    both = program(call("m0"), call("m1"), call("r", "m0.out", "m1.out"), target=wanted)
    assert deduced(both) == {"m0": (LATENCY, None, 0), "m1": (BACKGROUND, "r", 0), "r": (BACKGROUND, None, 1)}


def test_growth_deduces_again() -> None:
    growing = program(call("a"), open=True)
    assert deduced(growing) == {"a": (BACKGROUND, None, 0)}  # nothing waits for it yet
    growing.grow(ProgramGrowth(calls=[call("b", "a.out")], targets=targets("b.out")), 1.0)
    assert deduced(growing) == {"a": (LATENCY, None, 0), "b": (LATENCY, None, 1)}
    more = ProgramGrowth(calls=[call("c"), call("d", "b.out", "c.out")], targets=targets("d.out"))
    growing.grow(more, 2.0)
    assert deduced(growing)["b"] == (LATENCY, None, 1)  # still a target of its own
    assert deduced(growing)["c"] == (GROUP, "d", 0)


def test_ready_calls_are_handed_out_by_class_and_a_growth_can_change_it() -> None:
    growing = program(call("idle"), call("urgent"), target="urgent.out", open=True, max_concurrency=1)
    assert [node.call.id for node in growing.take_ready(0.0)] == ["urgent"]

    growing = program(call("idle"), call("later"), open=True, max_concurrency=1)
    growing.grow(ProgramGrowth(targets=targets("later.out")), 1.0)
    assert [node.call.id for node in growing.take_ready(1.0)] == ["later"]


def test_a_wide_and_deep_program_is_deduced_quickly_enough_to_count() -> None:
    """Every call of a layer reads all of the layer before: 20 layers of 50, 47,500 edges."""
    steps = []
    for layer in range(20):
        before = [f"l{layer - 1}.{i}.out" for i in range(50)] if layer else []
        steps += [call(f"l{layer}.{i}", *before) for i in range(50)]
    result = deduced(program(*steps, call("end", *[f"l19.{i}.out" for i in range(50)]), target="end.out"))
    assert result["l0.0"] == (GROUP, "l1.49", 0)
    assert result["l19.7"] == (GROUP, "end", 19)
    assert result["end"] == (LATENCY, None, 20)


def test_what_is_left_is_the_longest_path_in_output_tokens() -> None:
    steps = [
        call("a", max_tokens=10),
        call("b", "a.out", max_tokens=20),
        call("c", "a.out", max_tokens=5),
        call("d", "b.out", "c.out", max_tokens=100_000),
    ]
    nodes = program(*steps, target="d.out").calls
    assert {name: node.remaining_tokens for name, node in nodes.items()} == {"a": 286, "b": 276, "c": 261, "d": 256}


def test_a_deadline_holds_for_all_that_comes_before() -> None:
    steps = [call("a"), call("b", "a.out"), call("c", "a.out")]
    nodes = program(*steps, target=[*targets("b.out", deadline_ms=50), *targets("c.out", deadline_ms=90)]).calls
    assert {name: node.deadline_ms for name, node in nodes.items()} == {"a": 50, "b": 50, "c": 90}
    assert program(call("a"), target="a.out").calls["a"].deadline_ms == math.inf
