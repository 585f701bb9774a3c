from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.utils import mustache

from macaw_server.programs.transforms import TransformArgsError, compile_transform
from server.programs.builders import transform


def apply(op: str, *values: str, **args: Any) -> str:
    names = [f"v{i}" for i in range(len(values))]
    return compile_transform(transform("t", op, *names, **args))(values)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, " a  \nb"),
        ({"separator": ", "}, " a ,  \n, b"),
        ({"separator": ",", "strip": True}, "a,,b"),
        ({"separator": ",", "drop_blank": True}, " a ,b"),
        ({"separator": ",", "strip": True, "drop_blank": True}, "a,b"),
    ],
)
def test_join(args: dict[str, Any], expected: str) -> None:
    assert apply("join", " a ", " \n", "b", **args) == expected


def test_join_may_name_a_variable_twice() -> None:
    assert compile_transform(transform("t", "join", "a", "b", "a"))(["1", "2", "1"]) == "121"


def test_joins_of_joins_cannot_fill_the_memory() -> None:
    text = "a" * 2**20
    assert len(apply("join", *[text] * 16)) == 2**24
    with pytest.raises(ValueError, match="the joined text of 16,777,231 characters is over the limit of 16,777,216"):
        apply("join", *[text] * 16, separator=",")


def test_strip() -> None:
    assert apply("strip", "\n a b\t") == "a b"


@given(st.text())
def test_html_escape_is_what_langchain_renders(text: str) -> None:
    assert apply("html_escape", text) == mustache.render("{{x}}", {"x": text})


@pytest.mark.parametrize(
    ("pointer", "expected"),
    [
        ("", '{"a":["x",{"é":1.5}],"b/c":null,"~":true,"~1":1}'),
        ("/a/0", "x"),
        ("/a/1", '{"é":1.5}'),
        ("/a/1/é", "1.5"),
        ("/b~1c", "null"),
        ("/~0", "true"),
        ("/~01", "1"),
    ],
)
def test_json_pointer(pointer: str, expected: str) -> None:
    document = '{"a": ["x", {"é": 1.5}], "b/c": null, "~": true, "~1": 1}'
    assert apply("json_pointer", document, pointer=pointer) == expected


values = st.none() | st.text(max_size=5) | st.integers()


@given(st.recursive(values, lambda v: st.lists(v) | st.dictionaries(st.text("a~/01", max_size=3), v), max_leaves=8))
def test_json_pointer_reaches_every_value(document: Any) -> None:
    def check(value: Any, pointer: str) -> None:
        found = apply("json_pointer", text, pointer=pointer)
        assert (found if isinstance(value, str) else json.loads(found)) == value
        items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
        for key, child in items:
            check(child, f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}")

    text = json.dumps(document)
    check(document, "")


@pytest.mark.parametrize(
    ("document", "pointer", "message"),
    [
        ("Sure! {}", "/a", "not JSON (Expecting value: line 1 column 1 (char 0)): 'Sure! {}'"),
        ("[NaN]", "/0", "NaN is not JSON"),
        ("[" * 200_000, "/0", "JSON is nested too deeply"),
        (r'["\ud800"]', "/0", "the value at '/0' holds half a surrogate pair"),
        ('{"a": {"b": 1}}', "/a/c", "no key 'c' at '/a'; its keys are \"'b'\""),
        ('{"a": [1, 2]}', "/a/2", "no index '2' at '/a'; it is an array of 2"),
        ('{"a": [1, 2]}', "/a/01", "no index '01' at '/a'; it is an array of 2"),
        ('{"a": [1, 2]}', "/a/-", "no index '-' at '/a'; it is an array of 2"),
        ('{"a": "x"}', "/a/0", "no '0' at '/a': the value there is neither an object nor an array"),
    ],
)
def test_json_pointer_that_finds_nothing(document: str, pointer: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        apply("json_pointer", document, pointer=pointer)


def test_regex() -> None:
    answer = "Thought: é\nAction: search\nAction Input: macaws"
    assert apply("regex", answer, pattern=r"Action: (\w+)") == "Action: search"
    assert apply("regex", answer, pattern=r"Action: (\w+)", group=1) == "search"
    assert apply("regex", answer, pattern=r"(?s)Thought: (.).*(Input)", group=1) == "é"


def test_regex_takes_linear_time() -> None:
    """A backtracking engine would need 2^50000 steps here."""
    with pytest.raises(ValueError, match="no match"):
        apply("regex", "a" * 50_000 + "b", pattern="^(a+)+$")


@pytest.mark.parametrize(
    ("args", "value", "message"),
    [
        ({"pattern": "x"}, "a" * 100, f"no match for pattern 'x' in '{'a' * 80}…'"),
        ({"pattern": "a(b)?", "group": 1}, "a", "group 1 of pattern 'a(b)?' took no part in the match"),
    ],
)
def test_regex_without_a_match(args: dict[str, Any], value: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        apply("regex", value, **args)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, "1. a\n\n2. b\n3. c"),
        ({"drop_blank": True}, "1. a\n2. b\n3. c"),
        ({"stop": 2, "drop_blank": True}, "1. a\n2. b"),
        ({"start": -1}, "3. c"),
        ({"start": 10}, ""),
    ],
)
def test_lines(args: dict[str, Any], expected: str) -> None:
    assert apply("lines", "1. a\n\n2. b\r\n3. c\n", **args) == expected


@pytest.mark.parametrize(
    ("op", "args", "arg", "message"),
    [
        (
            "regex",
            {"pattern": "(a"},
            "pattern",
            "Pattern '(a' is not a regular expression that RE2 accepts: missing )",
        ),
        ("regex", {"pattern": r"(a)\1"}, "pattern", "RE2 has no look-around and no backreferences"),
        (
            "regex",
            {"pattern": "(a)", "group": 2},
            "group",
            "Group 2 of pattern '(a)', which has groups 0 to 1.",
        ),
        (
            "json_pointer",
            {"pointer": "a"},
            "pointer",
            "Pointer 'a' must be empty (the whole value) or start with '/'.",
        ),
        (
            "json_pointer",
            {"pointer": "/a~2"},
            "pointer",
            "Pointer '/a~2' has a bare '~': write '~0' for '~', '~1'",
        ),
    ],
)
def test_arguments_that_cannot_work(op: str, args: dict[str, Any], arg: str, message: str) -> None:
    with pytest.raises(TransformArgsError) as caught:
        compile_transform(transform("t", op, "a", **args))
    assert caught.value.arg == arg
    assert message in str(caught.value)
