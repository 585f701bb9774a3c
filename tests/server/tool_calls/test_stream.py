"""However an answer is cut into pieces, the same content and the same calls come out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from macaw_server.tool_calls import FORMATS, Arguments, Call, CallStart, Content, ToolCallStream, collected, parse
from macaw_server.tool_calls.types import CallBody, Taken

SCHEMAS = {
    "f": {"properties": {"a": {"type": "integer"}, "s": {"type": "string"}, "l": {"type": "array"}}},
    "g": {"properties": {}},
}
ARGUMENTS: list[dict[str, Any]] = [
    {"a": 1},
    {"a": -7, "s": 'x"]})}\\ </tool_call> {"', "l": [{"b": [None, True]}, 2.5, ""]},
    {},
]


BEGIN, SEP, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def written(name: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as a model of this family writes them."""
    objects = [json.dumps({"name": f, "arguments": a}, ensure_ascii=False) for f, a in calls]
    match name:
        case "hermes":
            return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)
        case "llama3_json":
            return "; ".join(text.replace('"arguments": ', '"parameters": ', 1) for text in objects)
        case "mistral":
            return f"[TOOL_CALLS] [{', '.join(objects)}]"
        case "mistral_args":
            return "".join(f"[TOOL_CALLS]{f}[ARGS]{json.dumps(a)}" for f, a in calls)
        case "deepseek_v3":
            blocks = (f"{BEGIN}function{SEP}{f}\n```json\n{json.dumps(a)}\n```{END}" for f, a in calls)
            return "<｜tool▁calls▁begin｜>" + "\n".join(blocks) + "<｜tool▁calls▁end｜>"
        case "deepseek_v31":
            blocks = (f"{BEGIN}{f}{SEP}{json.dumps(a)}{END}" for f, a in calls)
            return "<｜tool▁calls▁begin｜>" + "".join(blocks) + "<｜tool▁calls▁end｜>"
        case "granite":
            return f"<|tool_call|>[{', '.join(objects)}]"
        case "qwen3_coder":
            return "\n".join(f"<tool_call>\n<function={f}>\n{_tags(a)}</function>\n</tool_call>" for f, a in calls)
        case "pythonic":
            literals = (f"{f}({', '.join(f'{key}={value!r}' for key, value in a.items())})" for f, a in calls)
            return f"[{', '.join(literals)}]"
    raise AssertionError(name)


def _tags(arguments: dict[str, Any]) -> str:
    return "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )


def in_pieces(name: str, text: str, cuts: list[int], max_calls: int | None = None) -> tuple[str, list[Call], bool]:
    stream = ToolCallStream(FORMATS[name], SCHEMAS, max_calls)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    pieces, start = [], 0
    for end in ends:
        pieces += stream.add(text[start:end])
        start = end
    pieces += stream.end()
    begun = 0
    for piece in pieces:
        assert not isinstance(piece, Content | Arguments) or piece.text
        assert not isinstance(piece, Arguments) or begun, "arguments belong to a call"
        begun += isinstance(piece, CallStart)
    assert begun == stream.num_calls
    return *collected(pieces), stream.complete


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("calls", [[("f", a)] for a in ARGUMENTS] + [[("f", ARGUMENTS[1]), ("g", {}), ("f", {"a": 2})]])
def test_calls_are_read_as_they_were_meant(name: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    text = written(name, calls)
    for step in (1, 3, len(text)):
        content, read, complete = in_pieces(name, text, list(range(0, len(text), step)))
        assert [(call.name, json.loads(call.arguments)) for call in read] == calls
        assert (content, complete) == ("", True)


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<tool", "_call>", "\n", " ", "Hi.", "{", "}", "[", "]", '"', "\\", ",", ";", "é"),
    *('{"name": "f", "arguments": ', '{"name": "f", "parameters": ', '{"a": 1}', '"arguments": {}', '"name": "g"'),
    *("[TOOL_CALLS]", "f[ARGS]", "<|tool_call|>", "<|python_tag|>", "<|python_start|>", "<|python_end|>", '"id": "x"'),
    *("<｜tool▁calls▁begin｜>", BEGIN, SEP, END, "function", "```json", "```", "<｜tool▁calls▁end｜>"),
    *("<function=f>", "</function>", "<parameter=a>", "</parameter>", "[f(", "a=1", ")", "<", "|"),
]
ANSWERS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    st.tuples(
        st.sampled_from(["", "Let me see.\n", " "]),
        st.sampled_from(list(FORMATS)),
        st.lists(st.tuples(st.sampled_from("fg"), st.sampled_from(ARGUMENTS)), min_size=1, max_size=3),
        st.sampled_from(["", "\n", " Done.", "<tool_call>", "}"]),
        st.integers(0, 400),
    ).map(lambda t: (t[0] + written(t[1], t[2]) + t[3])[: t[4]]),
)


@pytest.mark.parametrize("name", FORMATS)
@given(text=ANSWERS, cuts=st.lists(st.integers(0, 300), max_size=20), max_calls=st.sampled_from([None, None, 1, 2]))
def test_any_cut_gives_what_the_whole_gives(name: str, text: str, cuts: list[int], max_calls: int | None) -> None:
    whole = in_pieces(name, text, [], max_calls)
    assert in_pieces(name, text, cuts, max_calls) == whole
    assert in_pieces(name, text, list(range(len(text))), max_calls) == whole
    content, calls, _ = whole
    if not calls:
        assert content == text, "an answer without calls stays as it is"
    assert max_calls is None or len(calls) <= max_calls


def test_content_around_calls_stays_without_their_markup() -> None:
    call = written("hermes", [("f", {"a": 1})])
    assert parse(FORMATS["hermes"], {}, f"Let me see.\n\n{call}\n{call}\n")[0] == "Let me see."
    assert parse(FORMATS["hermes"], {}, f"One {call} two")[0] == "One two"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>\nnope\n</tool_call>"),
        ("hermes", '<tool_call>{"foo": 1}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": [], "name": "f"}</tool_call>'),
        ("hermes", "a < b <tool_cal"),
        ("llama3_json", '{"temperature": 21}'),
        ("llama3_json", 'See {"name": "f", "parameters": {}}'),
        ("mistral", "[TOOL_CALLS]"),
        ("pythonic", "[1, 2] and [f(1)]"),
        ("pythonic", "[f(a=b)]"),
        ("pythonic", "[f(**{})]"),
        ("pythonic", "[" * 500 + "f()" + "]" * 500),
        ("qwen3_coder", "<tool_call><funktion=f>"),
    ],
)
def test_what_only_looks_like_a_call_is_content(name: str, text: str) -> None:
    assert in_pieces(name, text, list(range(len(text)))) == (text, [], False)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        '<tool_call>{"id": "7", "name": "f", "arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}</tool_call>',
    ],
)
def test_unusual_orders_of_keys_are_read_too(text: str) -> None:
    content, (call,), complete = in_pieces("hermes", text, [])
    assert (content, call.name, json.loads(call.arguments), complete) == ("", "f", {"a": 1}, True)


def test_arguments_come_while_they_are_written() -> None:
    stream = ToolCallStream(FORMATS["hermes"], {})
    assert stream.add('<tool_call>\n{"name": "f", "arguments": {"a"') == [CallStart("f"), Arguments('{"a"')]
    assert stream.add(": [1") == [Arguments(": [1")]
    assert stream.end() == []
    assert not stream.complete


def test_an_argument_that_is_text_by_the_schema_is_never_read_as_json() -> None:
    text = "<tool_call>\n<function=f>\n<parameter=s>\n12\n</parameter>\n<parameter=x>\nTrue\n</parameter>\n</function>"
    (call,) = parse(FORMATS["qwen3_coder"], SCHEMAS, text)[1]
    assert json.loads(call.arguments) == {"s": "12", "x": True}


class Counting:
    """A reader of a call, and how many characters it was given."""

    num_chars = 0

    def __init__(self, body: CallBody) -> None:
        self._body = body

    def take(self, text: str, *, last: bool) -> Taken:
        Counting.num_chars += len(text)
        return self._body.take(text, last=last)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "pythonic"])  # a list is read as a whole
def test_reading_a_long_argument_is_linear_work(name: str) -> None:
    format = FORMATS[name]
    counted = replace(format, body=lambda schemas: Counting(format.body(schemas)))
    text = written(name, [("f", {"s": "some </words> " * 200})])
    stream, Counting.num_chars = ToolCallStream(counted, SCHEMAS), 0
    pieces = [piece for char in text for piece in stream.add(char)] + stream.end()
    assert [call.name for call in collected(pieces)[1]] == ["f"]
    assert Counting.num_chars < 4 * len(text) + 4000, "headers and tails are read again, values are not"


def test_an_answer_is_over_with_the_calls_that_it_may_have() -> None:
    stream = ToolCallStream(FORMATS["hermes"], {}, max_calls=1)
    text = written("hermes", [("f", {}), ("g", {})])
    content, calls = collected([*stream.add(text), *stream.end()])
    assert (content, [call.name for call in calls], stream.over, stream.complete) == ("", ["f"], True, True)
