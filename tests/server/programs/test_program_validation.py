from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from macaw.errors import InvalidProgramError
from macaw.protocol import Call, ProgramGrowth, ProgramRequest, Transform, Variable
from macaw_server.programs.program import Program
from server.programs.builders import call, program, request, run, targets, transform


def named(step: Call | Transform, **update: str) -> Any:
    return step.model_copy(update=update)


def text_call(prompt: Any, **fields: Any) -> Call:
    return Call.model_validate({"id": "a", "output": "a.out", "request": {"prompt": prompt, **fields}})


# (request, code, param, message)
INVALID: dict[str, tuple[Callable[[], ProgramRequest], str, str, str]] = {
    "unknown variable in a chat": (
        lambda: request(call("a", "dco0"), target="a.out", variables={"doc0": Variable(value="x")}),
        "unknown_variable",
        "calls[0].request.messages[0].content[1].variable",
        "Variable 'dco0' is not in the program. Did you mean 'doc0'? Declare it in variables, or let a call "
        "or a transform produce it.",
    ),
    "unknown variable in a prompt": (
        lambda: request(text_call([{"type": "variable", "variable": "x"}]), target="a.out"),
        "unknown_variable",
        "calls[0].request.prompt[0].variable",
        "Variable 'x' is not in the program. Declare it",
    ),
    "unknown variable in a transform": (
        lambda: request(call("a"), transform("t", "join", "a.out", "x"), target="t.out"),
        "unknown_variable",
        "transforms[0].inputs[1]",
        "Variable 'x' is not in the program.",
    ),
    "unknown target": (
        lambda: request(call("a"), target=targets("a.out", "b.out")),
        "unknown_variable",
        "targets[1].variable",
        "Variable 'b.out' is not in the program. Did you mean 'a.out'?",
    ),
    "two calls with one output": (
        lambda: request(call("a"), named(call("b"), output="a.out"), target="a.out"),
        "invalid_program",
        "calls[1].output",
        "Variable 'a.out' is already produced by 'a'. A variable has one producer: give this output a name",
    ),
    "output of a client's variable": (
        lambda: request(
            call("b"),
            named(transform("t", "strip", "b.out"), output="x"),
            target="x",
            variables={"x": Variable(external=True)},
        ),
        "invalid_program",
        "transforms[0].output",
        "Variable 'x' is already produced by the client (it is listed in variables).",
    ),
    "one id twice": (
        lambda: request(call("a"), named(transform("t", "strip", "a.out"), id="a"), target="t.out"),
        "invalid_program",
        "transforms[0].id",
        "Id 'a' is already used by calls[0]. Ids of calls and transforms are unique in a program.",
    ),
    "cycle": (
        lambda: request(
            call("x"),
            call("a", "x.out", "t.out"),
            call("b", "a.out"),
            transform("t", "strip", "b.out"),
            target="b.out",
        ),
        "cycle",
        "calls[1]",
        "The graph has a cycle: a -> b -> t -> a. Each step needs the one before it",
    ),
    "its own input": (
        lambda: request(call("a", "a.out"), target="a.out"),
        "cycle",
        "calls[0]",
        "The graph has a cycle: a -> a.",
    ),
    "no targets": (
        lambda: request(call("a")),
        "invalid_program",
        "targets",
        'List the variables that you want in targets, or set "open": true',
    ),
    "a call that no target needs": (
        lambda: request(call("a"), call("b", "a.out"), call("c"), target="b.out"),
        "invalid_program",
        "calls[2].output",
        "No target needs call 'c', so it would run for nothing. Add its output 'c.out' to targets",
    ),
    "a bad pattern": (
        lambda: request(call("a"), transform("t", "regex", "a.out", pattern="("), target="t.out"),
        "invalid_program",
        "transforms[0].args.pattern",
        "Transform 't' (regex) cannot work. Pattern '(' is not a regular expression that RE2 accepts",
    ),
    "a bad pointer": (
        lambda: request(call("a"), transform("t", "json_pointer", "a.out", pointer="x"), target="t.out"),
        "invalid_program",
        "transforms[0].args.pointer",
        "Transform 't' (json_pointer) cannot work. Pointer 'x' must be empty",
    ),
    "several prompts": (
        lambda: request(text_call(["one", "two"]), target="a.out"),
        "invalid_program",
        "calls[0].request.prompt",
        "Call 'a' has a list of 2 prompts, but one output. Give each prompt a call of its own.",
    ),
    "several prompts of token ids": (
        lambda: request(text_call([[1], [2]]), target="a.out"),
        "invalid_program",
        "calls[0].request.prompt",
        "Call 'a' has a list of 2 prompts",
    ),
    "token ids": (
        lambda: request(text_call([1, 2]), target="a.out"),
        "invalid_program",
        "calls[0].request.prompt",
        "Call 'a' has a prompt of token ids. In a program a prompt is a string",
    ),
    "stream": (
        lambda: request(call("a", stream=False), target="a.out"),
        "invalid_program",
        "calls[0].request.stream",
        "Call 'a' sets stream, which a call inside a program does not take: streaming is the program's",
    ),
    "hints": (
        lambda: request(call("a", macaw={"app": "x"}), target="a.out"),
        "invalid_program",
        "calls[0].request.macaw",
        "Call 'a' sets macaw, which a call inside a program does not take: hints are for requests without",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_unsound_program_is_refused(name: str) -> None:
    build, code, param, message = INVALID[name]
    with pytest.raises(InvalidProgramError) as caught:
        Program("p", build())
    assert (caught.value.code, caught.value.param, caught.value.status) == (code, param, 400)
    assert message in caught.value.message


def test_stream_options_are_refused_by_name() -> None:
    with pytest.raises(InvalidProgramError) as caught:
        program(call("a", stream=True, stream_options={"include_usage": True}), target="a.out")
    assert caught.value.param == "calls[0].request.stream"

    options = call("a", stream=True, stream_options={"include_usage": True})
    options.request.stream = None
    with pytest.raises(InvalidProgramError) as caught:
        program(options, target="a.out")
    assert caught.value.param == "calls[0].request.stream_options"


def test_a_plain_request_says_what_a_request_says() -> None:
    plain = Program("p", request(text_call([1, 2], stream=True, macaw={"app": "x"}), target="a.out"), plain=True)
    assert run(plain) == ["a"]
    with pytest.raises(InvalidProgramError, match="2 prompts"):
        Program("p", request(text_call(["one", "two"]), target="a.out"), plain=True)


def grown(program: Program) -> tuple[Any, ...]:
    """Everything that a refused growth must leave alone."""
    return (
        program.state(0.0).model_dump(),
        list(program.events),
        program.running_calls(),
        program.slack(lambda node: 0.0),
    )


@pytest.mark.parametrize(
    ("growth", "param"),
    [
        (ProgramGrowth(calls=[call("b"), call("a")]), "calls[1].id"),
        (ProgramGrowth(calls=[call("b"), named(call("c"), output="a.out")]), "calls[1].output"),
        (ProgramGrowth(calls=[call("b")], variables={"a.out": Variable(value="x")}), "variables.a.out"),
        (ProgramGrowth(variables={"x": Variable(external=True)}), "variables.x"),
        (
            ProgramGrowth(calls=[call("b"), call("c", "y")]),
            "calls[1].request.messages[0].content[1].variable",
        ),
        (ProgramGrowth(calls=[call("b")], targets=targets("y")), "targets[0].variable"),
        (ProgramGrowth(calls=[call("b", "c.out"), call("c", "b.out")]), "calls[0]"),
        (
            ProgramGrowth(calls=[call("b")], transforms=[transform("t", "regex", "b.out", pattern="(")]),
            "transforms[0].args.pattern",
        ),
        (
            ProgramGrowth(calls=[call("b"), call("c")], targets=targets("b.out"), close=True),
            "calls[1].output",
        ),
        (ProgramGrowth(calls=[call("b", stream=True)]), "calls[0].request.stream"),
    ],
)
def test_a_refused_growth_changes_nothing(growth: ProgramGrowth, param: str) -> None:
    growing = program(call("a"), target="a.out", open=True, variables={"x": Variable(external=True)})
    before = grown(growing)
    with pytest.raises(InvalidProgramError) as caught:
        growing.grow(growth, 1.0)
    assert caught.value.param == param
    assert grown(growing) == before
    # its names are free, and the program is still open
    growing.grow(ProgramGrowth(calls=[call("b"), call("c", "b.out", "x")], targets=targets("c.out")), 2.0)
    growing.set_variable("x", "v", 3.0)
    growing.grow(ProgramGrowth(close=True), 4.0)
    assert run(growing) == ["a", "b", "c"]
    assert growing.status == "completed"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("y", "unknown_variable", "Program 'p' has no variable 'y'. Its external variables: 'x'."),
        ("doc", "invalid_program", "Variable 'doc' cannot be set: it was declared with its value."),
        ("a.out", "invalid_program", "Variable 'a.out' cannot be set: 'a' produces it."),
        ("x", "invalid_program", "Variable 'x' already has another value. A variable is set once"),
    ],
)
def test_variables_that_cannot_be_set(name: str, code: str, message: str) -> None:
    given = {"x": Variable(external=True), "doc": Variable(value="d")}
    waiting = program(call("a", "x", "doc"), target="a.out", variables=given)
    waiting.set_variable("x", "first", 1.0)
    with pytest.raises(InvalidProgramError) as caught:
        waiting.set_variable(name, "second", 2.0)
    assert (caught.value.code, caught.value.param) == (code, f"variables.{name}")
    assert message in caught.value.message


def test_an_ended_program_takes_no_values() -> None:
    ended = program(call("a"), target="a.out", variables={"x": Variable(external=True)})
    run(ended)
    with pytest.raises(InvalidProgramError, match=r"'p' has ended \(completed\) and takes no value for 'x'"):
        ended.set_variable("x", "v", 1.0)
