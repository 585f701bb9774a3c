import doctest

import pytest
from pydantic import ValidationError

from macaw import ProgramBuilder, Ref, builder
from macaw.protocol import Message, ProgramGrowth, TextPart, Transform, Variable, VariablePart


def test_docstring_example_runs():
    assert doctest.testmod(builder).attempted > 0
    assert doctest.testmod(builder).failed == 0


def test_map_reduce_is_the_program_of_the_protocol():
    b = ProgramBuilder("m")
    doc = b.variable("doc0", value="...")
    notes = [b.chat("Summarise:\n", doc, max_tokens=50, name="s0"), b.chat("Again:\n", doc, name="s1")]
    both = b.join(notes, separator="\n", name="all")
    b.target(b.chat("Combine:\n", both, temperature=0, name="final"), objective="throughput", deadline_ms=100)
    program = b.build(detached=True, metadata={"app": "test"})

    assert program.model == "m"
    assert program.variables == {"doc0": Variable(value="...")}
    assert [(call.id, call.output, call.inputs) for call in program.calls] == [
        ("s0", "s0", ["doc0"]),
        ("s1", "s1", ["doc0"]),
        ("final", "final", ["all"]),
    ]
    assert program.calls[0].request.max_tokens == 50
    assert program.calls[0].request.messages == [
        Message(role="user", content=[TextPart(text="Summarise:\n"), VariablePart(variable="doc0")])
    ]
    assert program.transforms == [
        Transform(id="all", op="join", inputs=["s0", "s1"], output="all", args={"separator": "\n"})
    ]
    assert program.targets[0].model_dump() == {
        "variable": "final",
        "objective": "throughput",
        "deadline_ms": 100.0,
    }
    assert (program.detached, program.metadata) == (True, {"app": "test"})


def test_system_message_comes_first():
    b = ProgramBuilder()
    b.chat("Hi", system=["Speak ", b.external("language")])
    system, user = b.build().calls[0].request.messages
    assert (system.role, user.role) == ("system", "user")
    assert system.content == [TextPart(text="Speak "), VariablePart(variable="language")]


def test_messages_may_hold_variables():
    b = ProgramBuilder()
    question = b.external("question")
    b.call([{"role": "user", "content": question, "name": "ann"}, {"role": "assistant", "content": "Hm."}])
    first, second = b.build().calls[0].request.messages
    assert (first.content, first.name) == ([VariablePart(variable="question")], "ann")
    assert second.content == [TextPart(text="Hm.")]


def test_messages_of_tool_calls():
    b = ProgramBuilder()
    fog = b.external("fog")
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": [fog]},
    ]
    b.call(messages, name="a", tools=[{"type": "function", "function": {"name": "weather"}}])
    (made,) = b.growth().calls
    _, calling, answer = made.request.messages
    assert (calling.parts, calling.tool_calls[0].function.name) == ([], "weather")
    assert (made.inputs, answer.parts) == (["fog"], [VariablePart(variable="fog")])
    with pytest.raises(ValidationError, match="without|is missing"):
        b.call([{"role": "assistant"}])


def test_text_completion():
    b = ProgramBuilder()
    b.complete("Once ", b.external("who"), stop="\n")
    [call] = b.build().calls
    assert call.request.prompt == [TextPart(text="Once "), VariablePart(variable="who")]
    assert call.request.stop == "\n"


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("strip", {}),
        ("html_escape", {}),
        ("json_pointer", {"pointer": "/a"}),
        ("regex", {"pattern": "(a)", "group": 1}),
        ("lines", {"start": 1, "drop_blank": True}),
    ],
)
def test_transform(op, args):
    b = ProgramBuilder()
    ref = b.transform(op, b.external("x"), **args)
    assert b.build().transforms == [Transform(id=ref.name, op=op, inputs=["x"], output=ref.name, args=args)]


def test_unknown_options_are_refused_at_once():
    b = ProgramBuilder()
    with pytest.raises(ValidationError, match="max_token\n"):
        b.chat("Hi", max_token=3)
    with pytest.raises(ValidationError, match="sep\n"):
        b.join([b.external("x")], sep=",")
    with pytest.raises(ValidationError, match="takes exactly one input, 2 were given"):
        b.transform("strip", Ref("x"), Ref("y"))


def test_names_are_made_up_without_collision():
    b = ProgramBuilder()
    names = [b.chat("1", name="chat-1"), b.chat("2"), b.chat("3"), b.external(), b.variable(value="v")]
    assert [ref.name for ref in names] == ["chat-1", "chat-0", "chat-2", "external-0", "variable-0"]


def test_name_is_used_once():
    b = ProgramBuilder()
    b.external("x")
    with pytest.raises(ValueError, match="'x' is already used"):
        b.chat("Hi", name="x")


@pytest.mark.parametrize("put_into_string", ["{}".format, "a {0!s}".format, str])
def test_reference_cannot_become_text(put_into_string):
    with pytest.raises(TypeError, match="value of variable 'doc' is not known yet"):
        put_into_string(Ref("doc"))


def test_growth_is_what_is_new():
    b = ProgramBuilder("m")
    draft = b.chat("Draft", name="draft")
    b.target(draft)
    assert b.build(open=True).open
    assert b.growth() == ProgramGrowth()
    b.target(b.chat("Improve: ", draft, b.variable("hint", value="shorter"), name="better"))
    growth = b.growth(close=True)
    assert [call.id for call in growth.calls] == ["better"]
    assert list(growth.variables) == ["hint"]
    assert [target.variable for target in growth.targets] == ["better"]
    assert growth.close
    assert b.growth() == ProgramGrowth()


def test_built_program_does_not_change_with_the_builder():
    b = ProgramBuilder()
    b.chat("1")
    program = b.build()
    b.chat("2")
    assert len(program.calls) == 1
    assert [call.id for call in b.build().calls] == ["chat-0", "chat-1"]
