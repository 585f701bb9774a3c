"""Structured output: schemas as the server takes them, and parsers for answers that a grammar has held to them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from operator import itemgetter
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_openai_function
from langchain_core.utils.pydantic import is_basemodel_subclass

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")
_NAMED_SCHEMAS = {"properties", "$defs", "definitions"}
_LISTED_SCHEMAS = {"anyOf", "oneOf", "prefixItems"}
_SCHEMAS = {"items", "additionalProperties"}
_OPEN = {"additionalProperties", "anyOf", "oneOf", "$ref", "patternProperties", "if"}
"""Where one of these is, an object's properties are not all that it may have, or it is said that they are."""


def response_format(given: Any, *, strict: bool | None = None) -> dict[str, Any]:
    """OpenAI's `response_format` of a schema in any form that LangChain takes, or of one that is ready.

    Objects are closed where the schema leaves open what else they may have: a model that is held to a grammar would
    otherwise make up properties that nobody reads. What is generated so is valid against the given schema too.
    """
    if isinstance(given, dict) and given.get("type") in ("json_object", "text"):
        return given
    if isinstance(given, dict) and given.get("type") == "json_schema" and "json_schema" in given:
        named = dict(given["json_schema"])
    elif isinstance(given, dict) and "name" in given and "schema" in given:
        named = dict(given)
    else:
        named = convert_to_openai_function(given, strict=strict)
        named["schema"] = named.pop("parameters")
    if strict is not None:
        named["strict"] = strict
    named["name"] = _NOT_IN_NAMES.sub("_", named["name"])[:64]
    named["schema"] = _closed(named["schema"])
    return {"type": "json_schema", "json_schema": named}


def parsed(llm: Runnable[Any, Any], schema: Any, *, include_raw: bool) -> Runnable[Any, Any]:
    """`llm`, and its JSON behind it as an instance of `schema`, if that is a class of pydantic's, else as a dict."""
    parser = RunnableGenerator(_check_end, _acheck_end) | _parser(schema)
    if not include_raw:
        return llm | parser
    with_parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    without = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=llm) | with_parsed.with_fallbacks([without], exception_key="parsing_error")


def _parser(schema: Any) -> Runnable[Any, Any]:
    if not isinstance(schema, type) or not is_basemodel_subclass(schema):
        return JsonOutputParser()
    parser: PydanticOutputParser[Any] = PydanticOutputParser(pydantic_object=schema)

    def parse(message: AIMessage) -> Any:
        """Once, from the whole message; None where it asks for tools instead."""
        return None if message.tool_calls else parser.parse_result([ChatGeneration(message=message)])

    return RunnableLambda(parse).with_types(output_type=schema)


def _check_end(messages: Iterator[BaseMessage]) -> Iterator[BaseMessage]:
    for message in messages:
        _raise_if_cut(message)
        yield message


async def _acheck_end(messages: AsyncIterator[BaseMessage]) -> AsyncIterator[BaseMessage]:
    async for message in messages:
        _raise_if_cut(message)
        yield message


def _raise_if_cut(message: BaseMessage) -> None:
    """The parsers complete broken JSON by guessing; an object that is not whole is no answer."""
    if message.response_metadata.get("finish_reason") == "length":
        raise OutputParserException(
            "The answer was cut off before its JSON was complete. Raise max_tokens, or bound the schema's strings with "
            "maxLength and its lists with maxItems."
        )


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with `additionalProperties` false in objects that say which they have; as it is, if it combines any.

    Branches of `allOf` are one object in parts: none of them may be closed.
    """
    return schema if "allOf" in _keys(schema) else _close(schema)


def _close(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for key in _NAMED_SCHEMAS & schema.keys():
        if isinstance(schema[key], dict):
            closed[key] = {name: _close(value) for name, value in schema[key].items()}
    for key in _LISTED_SCHEMAS & schema.keys():
        if isinstance(schema[key], list):
            closed[key] = [_close(value) for value in schema[key]]
    for key in _SCHEMAS & schema.keys():
        closed[key] = _close(schema[key])
    if "properties" in schema and not _OPEN & schema.keys():
        closed["additionalProperties"] = False
    return closed


def _keys(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from node
        for value in node.values():
            yield from _keys(value)
    elif isinstance(node, list):
        for item in node:
            yield from _keys(item)
