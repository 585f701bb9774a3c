"""Tool calls on a real server, as clients ask for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from jsonschema import validate
from openai import OpenAI

from conftest import TENANTS
from macaw import MacawClient
from macaw.errors import InvalidProgramError
from macaw.protocol import CallCompleted, ProgramRequest
from macaw_server.serve import LocalServer

MODEL = "macaw-demo"
USER = [{"role": "user", "content": "How is the weather in Lima?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Lima", "Cusco"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"$ref": "#/$defs/unit"},
    },
    "required": ["city", "days", "unit"],
    "$defs": {"unit": {"enum": ["C", "F"]}},
}


def tool(name: str = "weather", parameters: dict[str, Any] | None = PARAMETERS, **fields: Any) -> dict[str, Any]:
    extra = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, "description": "Tells.", **extra, **fields}}


NAMED = {"type": "function", "function": {"name": "weather"}}
TOOLS = [tool(), tool("now", None)]


@pytest.fixture
def api(local_server: LocalServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{local_server.url}/v1", api_key=TENANTS[0], max_retries=0) as api:
        yield api


@pytest.mark.parametrize(
    "choice",
    [
        NAMED,
        "required",
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}},
    ],
)
def test_forced_calls_are_valid_streamed_and_not(api: OpenAI, choice: Any) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "messages": USER,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 2,
        "n": 3,
        "seed": 3,
    }
    answer = api.chat.completions.create(**fields)
    streamed: list[list[Any]] = [[], [], []]
    ends: dict[int, str] = {}
    for chunk in api.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            assert not choice.delta.content
            streamed[choice.index] += choice.delta.tool_calls or []
            if choice.finish_reason is not None:
                ends[choice.index] = choice.finish_reason
    for choice in answer.choices:
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert call.id.startswith("call_")
        if call.function.name == "weather":
            validate(json.loads(call.function.arguments), PARAMETERS)
        else:
            assert (call.function.name, call.function.arguments) == ("now", "{}")
        first, *more = streamed[choice.index]
        assert (first.index, first.type, first.function.name) == (0, "function", call.function.name)
        assert first.id.startswith("call_")
        assert {(delta.index, delta.id, delta.function.name) for delta in more} <= {(0, None, None)}
        arguments = "".join(delta.function.arguments for delta in (first, *more))
        assert arguments == call.function.arguments
        assert len(streamed[choice.index]) > 1 or arguments == "{}", "arguments come as they are written"
        assert ends[choice.index] == "tool_calls"
    assert len({call.id for choice in answer.choices for call in choice.message.tool_calls}) == 3


def test_the_answer_of_a_tool_goes_back(api: OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "max_tokens": 40}
    first = api.chat.completions.create(messages=USER, tool_choice=NAMED, **fields)
    message = first.choices[0].message
    (call,) = message.tool_calls
    history = [*USER, message, {"role": "tool", "tool_call_id": call.id, "content": "Fog."}]
    second = api.chat.completions.create(messages=history, **fields)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens > 100, "the tools are the prefix of both"
    assert second.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_openais_parse_of_strict_tools(api: OpenAI) -> None:
    parameters = {**PARAMETERS, "additionalProperties": False}
    strict = tool(parameters=parameters, strict=True)
    parsed = api.chat.completions.parse(model=MODEL, messages=USER, tools=[strict], tool_choice="required", seed=1)
    for call in parsed.choices[0].message.tool_calls:
        validate(call.function.parsed_arguments, parameters)


def test_auto_with_a_response_format_answers_with_one_or_the_other(api: OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"], "additionalProperties": False}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    kinds = set()
    for seed in range(12):
        answer = api.chat.completions.create(
            model=MODEL,
            messages=USER,
            tools=TOOLS,
            response_format=format,
            parallel_tool_calls=False,
            seed=seed,
            temperature=2,
        ).choices[0]
        kinds.add(answer.finish_reason)
        if answer.finish_reason == "stop":
            validate(json.loads(answer.message.content), schema)
        else:
            assert answer.message.tool_calls[0].function.name in ("weather", "now")
    assert kinds <= {"stop", "tool_calls"}


def test_calls_of_a_program(client: MacawClient) -> None:
    first = {"messages": USER, "tools": TOOLS, "tool_choice": NAMED, "temperature": 2}
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    after = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "variable", "variable": "fog"}]},
    ]
    body = {
        "variables": {"fog": {"value": "Fog."}},
        "calls": [
            {"id": "a", "output": "text", "request": first},
            {"id": "b", "output": "end", "request": {"messages": after, "tools": TOOLS, "max_tokens": 3}},
        ],
        "targets": [{"variable": "text"}, {"variable": "end"}],
        "stream": True,
    }
    events = list(client.stream_program(ProgramRequest.model_validate(body)))
    (completion,) = [e.completion for e in events if isinstance(e, CallCompleted) and e.call_id == "a"]
    (made,) = completion["choices"][0]["message"]["tool_calls"]
    validate(json.loads(made["function"]["arguments"]), PARAMETERS)
    assert events[-1].variables["text"] == ""

    body["calls"][0]["request"] = {**first, "tool_choice": {"type": "function", "function": {"name": "wether"}}}
    with pytest.raises(InvalidProgramError, match="'weather', 'now'") as error:
        client.run_program(ProgramRequest.model_validate({**body, "stream": False}))
    assert error.value.param == "calls[0].request.tool_choice.function.name"


def test_a_schema_that_cannot_be_kept_is_refused_where_it_is_strict(api: OpenAI) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "items": {}, "uniqueItems": True}}}
    fields: dict[str, Any] = {"model": MODEL, "messages": USER, "tool_choice": "required", "max_tokens": 5}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as error:
        api.chat.completions.create(tools=[tool(), tool("b", parameters, strict=True)], **fields)
    assert error.value.param == "tools[1].function.parameters"
    assert api.chat.completions.create(tools=[tool("b", parameters)], **fields).choices
