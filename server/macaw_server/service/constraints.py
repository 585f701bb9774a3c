"""Constrained decoding: from a request's fields to a grammar, and whether that grammar is one."""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, NoReturn

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from macaw.errors import InvalidRequestError
from macaw.protocol import ChatCompletionRequest, CompletionRequest, ResponseFormat, StructuredOutputs
from macaw_server.deep_thread import deep_thread
from macaw_server.engine.grammar import GrammarError, compile_grammar, error_of
from macaw_server.programs.rendering import Tokenizer
from macaw_server.service.tools import ToolUse, arguments_schema, content_schema
from macaw_server.tool_calls import lark

MAX_GRAMMAR_BYTES = 64 * 2**10
"""The largest accepted schema (as compact JSON), regular expression, list of choices or grammar, in UTF-8."""
MAX_TOOLS_GRAMMAR_BYTES = 256 * 2**10
"""The largest accepted grammar of all the functions that may be called."""
_MAX_CHECKED = 256
_PROBE_LEN = 16
_JSON_OPTIONS = {"lenient": False, "whitespace_pattern": r"[ \t\n\r]{0,32}"}
"""Keywords that llguidance does not enforce are refused, and a model cannot fill its context with white space."""
_REGEX_SYNTAX = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~]")


class Grammar(NamedTuple):
    """What an output must match.

    Attributes:
        field: Path of the request's field that says so.
        text: In llguidance's form, as `SamplingParams.grammar` takes it.
    """

    field: str
    text: str


def grammar_of(request: ChatCompletionRequest | CompletionRequest, tools: ToolUse | None = None) -> Grammar | None:
    """What the output must match, unchecked; None where anything goes.

    Raises:
        InvalidRequestError: It is too large, or has options that are not the client's to set.
    """
    if tools is not None:
        return _of_tools(request, tools, tools.special) if tools.needs_grammar else None
    match request.response_format, request.structured_outputs:
        case ResponseFormat(type="json_object"), _:
            return _of_schema({"type": "object"}, "response_format")
        case ResponseFormat(json_schema=dict(json_schema)), _:
            return _of_schema(json_schema["schema"], "response_format.json_schema.schema")
        case _, StructuredOutputs(regex=str(regex)):
            field = "structured_outputs.regex"
            return Grammar(field, LLMatcher.grammar_from_regex(_bounded(regex, field)))
        case _, StructuredOutputs(choice=list(choice)):
            field = "structured_outputs.choice"
            return Grammar(field, LLMatcher.grammar_from_regex(_bounded("|".join(map(_escaped, choice)), field)))
        case _, StructuredOutputs(grammar=str(grammar)):
            field = "structured_outputs.grammar"
            return Grammar(field, LLMatcher.grammar_from_lark(_bounded(grammar, field)))
    return None


class GrammarChecker:
    """Compiles grammars to find out whether they can be, in a thread of its own: some take seconds."""

    def __init__(self) -> None:
        self._checked: OrderedDict[str, None] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None

    async def check(
        self, request: ChatCompletionRequest | CompletionRequest, tools: ToolUse | None, tokenizer: Tokenizer
    ) -> None:
        """Refuse a request whose output cannot be constrained as it wants.

        Raises:
            InvalidRequestError: The grammar is wrong, too large, or not for this model.
        """
        for grammar in _parts(request, tools):
            await self._check(grammar, tokenizer)

    async def _check(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise InvalidRequestError(
                f"{grammar.field} needs a fast tokenizer, and this model has none. Leave it out.",
                code="unsupported_parameter",
                param=grammar.field,
            )
        if grammar.text not in self._checked:
            self._thread = self._thread or deep_thread("macaw-grammar-check")
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, _probe, grammar.text)
            except GrammarError as e:
                _refuse(grammar.field, f"cannot be compiled: {e}")
        self._checked[grammar.text] = None
        self._checked.move_to_end(grammar.text)
        if len(self._checked) > _MAX_CHECKED:
            self._checked.popitem(last=False)

    def close(self) -> None:
        """End the thread; what it is at is finished and dropped."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _of_schema(schema: dict[str, Any], field: str) -> Grammar:
    if "x-guidance" in schema:
        _refuse(field, 'has "x-guidance", whose options are the server\'s. Leave it out')
    text = _bounded(json.dumps(schema, ensure_ascii=False, separators=(",", ":")), field)
    return Grammar(field, LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))  # type: ignore[arg-type]


def _parts(request: ChatCompletionRequest | CompletionRequest, tools: ToolUse | None) -> Iterator[Grammar]:
    """What is compiled to check a request: with tools each schema too, so that the error can name it."""
    if tools is None:
        if (grammar := grammar_of(request)) is not None:
            yield grammar
        return
    if not tools.needs_grammar:
        return
    for position, function in tools.callable:
        field = f"tools[{position}].function.parameters"
        text = _bounded(json.dumps(arguments_schema(function), ensure_ascii=False), field)
        yield Grammar(field, LLMatcher.grammar_from_json_schema(text))
    if content_schema(request.response_format) is not None and (grammar := grammar_of(request)) is not None:
        yield grammar
    yield _of_tools(request, tools, {})  # over bytes there are no special tokens


def _of_tools(
    request: ChatCompletionRequest | CompletionRequest, tools: ToolUse, special: Mapping[str, int]
) -> Grammar:
    text = lark(tools.format.markup, tools.rules(content_schema(request.response_format)), special)
    return Grammar("tools", LLMatcher.grammar_from_lark(_bounded(text, "tools", MAX_TOOLS_GRAMMAR_BYTES)))


def _bounded(text: str, field: str, limit: int = MAX_GRAMMAR_BYTES) -> str:
    if (size := len(text.encode())) > limit:
        _refuse(field, f"has {size:,} bytes; at most {limit:,} are accepted")
    return text


def _escaped(choice: str) -> str:
    return _REGEX_SYNTAX.sub(r"\\\g<0>", choice)


def _refuse(field: str, why: str) -> NoReturn:
    raise InvalidRequestError(f"{field} {why}.", param=field)


def _probe(grammar: str) -> None:
    """Compile a grammar over single bytes and follow it a little, for some fail at their first steps only."""
    matcher = compile_grammar(_bytes_tokenizer(), grammar)
    for _ in range(_PROBE_LEN):
        allowed = matcher.compute_logit_bias()
        if matcher.is_error():
            raise GrammarError(error_of(matcher))
        byte = next((byte for byte in (*range(33, 256), *range(33)) if allowed[byte]), None)
        if byte is None:
            return
        matcher.consume_token(byte)


class _Bytes:
    """A vocabulary of all bytes and an end, which is the same for every model."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def _bytes_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()))
