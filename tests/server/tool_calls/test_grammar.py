"""Whatever a grammar lets a model write is a call that the parser of the same family reads."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from jsonschema import validate
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from macaw.protocol import Function
from macaw_server.engine.grammar import compile_grammar
from macaw_server.service.tools import arguments_schema
from macaw_server.tool_calls import FORMATS, CallRules, lark, parse

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"enum": ['"', "}]", "é"]}},
    "required": ["a"],
}
FUNCTIONS = [Function(name="f", parameters=PARAMETERS, strict=True), Function(name="g-2")]
SCHEMAS = {function.name: arguments_schema(function) for function in FUNCTIONS}
ANSWER = {"type": "object", "properties": {"z": {"type": "null"}}, "required": ["z"], "additionalProperties": False}
END = 256
MARKERS = {"[TOOL_CALLS]": 257, "<|tool_call|>": 258, "<|python_tag|>": 259, "[ARGS]": 260, "<｜tool▁sep｜>": 261}


class Vocabulary:
    """All bytes, an end, and special tokens."""

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>", *(marker.encode() for marker in MARKERS))
    special_token_ids = (END, *MARKERS.values())

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(Vocabulary()))


def special_of(name: str) -> dict[str, int]:
    return {marker: MARKERS[marker] for marker in FORMATS[name].markers if marker in MARKERS}


def compiled(tokenizer: LLTokenizer, name: str, special: dict[str, int], **rules: Any) -> LLMatcher:
    grammar = lark(FORMATS[name].markup, CallRules(SCHEMAS, **{"several": True, **rules}), special)
    return compile_grammar(tokenizer, LLMatcher.grammar_from_lark(grammar))


def text_of(tokens: list[int]) -> str:
    names = {id_: marker.encode() for marker, id_ in MARKERS.items()}
    return b"".join(names.get(token) or bytes([token]) for token in tokens).decode()


def tokens_of(text: str, special: dict[str, int]) -> list[int]:
    tokens: list[int] = []
    while text:
        marker = next((marker for marker in special if text.startswith(marker)), None)
        tokens += list(text[0].encode()) if marker is None else [special[marker]]
        text = text[len(marker or " ") :]
    return tokens


def walk(matcher: LLMatcher, rng: random.Random, most: int = 400) -> str:
    """An answer by a model of noise; it ends where it may."""
    tokens: list[int] = []
    while not matcher.is_stopped():
        allowed = [i for i, bias in enumerate(matcher.compute_logit_bias()) if bias]
        token = END if END in allowed and (len(tokens) > most or rng.random() < 0.5) else rng.choice(allowed)
        if token == END:
            break
        assert matcher.consume_token(token)
        tokens.append(token)
    return text_of(tokens)


@pytest.mark.parametrize("with_special", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_are_read_back_and_valid(tokenizer: LLTokenizer, name: str, with_special: bool) -> None:
    special = special_of(name) if with_special else {}
    names = set()
    for seed in range(6):
        for several in (False, True):
            text = walk(compiled(tokenizer, name, special, several=several), random.Random(seed))
            content, calls = parse(FORMATS[name], {}, text)
            assert content == ""
            assert calls
            assert several or len(calls) == 1
            for call in calls:
                names.add(call.name)
                validate(json.loads(call.arguments), PARAMETERS if call.name == "f" else {"maxProperties": 0})
    assert names == {"f", "g-2"}


def accepts(matcher: LLMatcher, tokens: list[int]) -> bool:
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("with_special", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_free_answers_are_text_or_valid_calls(tokenizer: LLTokenizer, name: str, with_special: bool) -> None:
    special = special_of(name) if with_special else {}
    markup = FORMATS[name].markup

    def call(arguments: str) -> str:
        prefix = markup.prefix.replace("{name}", "f")
        return f"{markup.begin}{markup.open}{prefix}{arguments}{markup.suffix}{markup.close}"

    before = "Hm < [T.\n" if markup.begin else ""
    for text, ok in [
        ("Hello <b> [x] 1 < 2.\n", True),
        ("", True),
        (before + call('{"a": 7}'), True),
        (before + call('{"a": "7"}'), False),
        (before + call("{}"), False),
    ]:
        matcher = compiled(tokenizer, name, special, free=True)
        assert accepts(matcher, tokens_of(text, special)) == ok, text


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].markup.begin])
def test_an_answer_that_is_no_call_keeps_its_own_schema(tokenizer: LLTokenizer, name: str) -> None:
    special = special_of(name)
    for text, ok in [('{"z": null}', True), ('{"z": 1}', False), ("Hello", False)]:
        assert accepts(compiled(tokenizer, name, special, content=ANSWER), tokens_of(text, special)) == ok


def test_what_a_schema_does_not_say_is_closed_where_it_is_an_object_of_properties() -> None:
    assert arguments_schema(Function(name="f"))["additionalProperties"] is False
    assert arguments_schema(FUNCTIONS[0])["additionalProperties"] is False
    for parameters in ({}, {"properties": {}, "additionalProperties": True}, {"properties": {}, "anyOf": [{}]}):
        assert arguments_schema(Function(name="f", parameters=parameters)).get("additionalProperties") is not False
