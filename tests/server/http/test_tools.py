"""Tools over HTTP: what the engine is asked, how its text becomes calls, and what is refused."""

import asyncio
import copy
import json
from dataclasses import replace

import pytest

from macaw_server.service import ProgramService, ServedModel, ServiceConfig
from server.http.conftest import Api, sse
from server.service.harness import EOS, MODEL, ScriptedEngine, call, encode, tokenizer, until

CHAT, PROGRAMS = "/v1/chat/completions", "/v1/programs"
USER = [{"role": "user", "content": "Hi"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
NAMED = {"type": "function", "function": {"name": "now"}}
FIRST = '<tool_call>\n{"name": "weather", "arguments": {"a": 1}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def made(call_id="call_1", name="weather", arguments="{}"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture
def saying(make_api):
    """An app whose model says something once."""

    def make(text):
        engine = ScriptedEngine({"Hi": text})
        engine.info = replace(engine.info, max_model_len=2000)  # the tools alone are some hundreds of tokens
        return make_api(engine)

    return make


def merged(chunks):
    """The messages that the deltas of a stream add up to, by choice, as a client makes them."""
    choices = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            message = choices.setdefault(choice["index"], {"content": "", "calls": [], "end": None})
            message["content"] += choice["delta"].get("content", "")
            for delta in choice["delta"].get("tool_calls", []):
                if "id" in delta:
                    assert delta["index"] == len(message["calls"])
                    assert delta["type"] == "function"
                    message["calls"].append([delta["id"], delta["function"]["name"], ""])
                message["calls"][delta["index"]][2] += delta["function"]["arguments"]
            message["end"] = choice["finish_reason"] or message["end"]
    return choices


@pytest.mark.parametrize(
    ("text", "content", "calls", "end"),
    [
        (FIRST, None, [("weather", '{"a": 1}')], "tool_calls"),
        (f"Let me see.\n{FIRST}\n{SECOND}", "Let me see.", [("weather", '{"a": 1}'), ("now", "{}")], "tool_calls"),
        ("Just < text.", "Just < text.", [], "stop"),
        ("<tool_call>\noops\n</tool_call>", "<tool_call>\noops\n</tool_call>", [], "stop"),
        ('<tool_call>{"name": "weather", "arguments": {"a": ', None, [("weather", '{"a": ')], "stop"),
    ],
)
async def test_calls_are_found_streamed_and_not(saying, text, content, calls, end):
    api = saying(text)
    whole = (await api.chat(tools=TOOLS, n=2)).json()
    for choice in whole["choices"]:
        message = choice["message"]
        assert (message["content"], choice["finish_reason"]) == (content, end)
        found = message.get("tool_calls", [])
        assert [(c["function"]["name"], c["function"]["arguments"]) for c in found] == calls
        assert ("tool_calls" in message) == bool(calls)
    chunks = [data for _, _, data in sse((await api.chat(tools=TOOLS, n=2, stream=True)).text) if data != "[DONE]"]
    for message in merged(chunks).values():
        assert message["content"] == (content or "")
        assert [(name, arguments) for _, name, arguments in message["calls"]] == calls
        assert message["end"] == end
        assert all(id_.startswith("call_") for id_, _, _ in message["calls"])


async def test_without_tools_or_with_none_to_call_an_answer_is_text(saying):
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        message = (await saying(FIRST).chat(**fields)).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": FIRST, "refusal": None}


async def test_the_length_that_cuts_a_call_is_the_reason(saying):
    choice = (await saying(FIRST).chat(tools=TOOLS, max_tokens=len(encode(FIRST)) - 12)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    choice = (await saying(FIRST + SECOND).chat(tools=TOOLS, stop="arg")).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", FIRST.partition("arg")[0])


async def test_an_answer_ends_with_the_only_call_that_it_may_have(saying):
    api = saying(f"{FIRST}\n{SECOND}")
    completion = (await api.chat(tools=TOOLS, parallel_tool_calls=False)).json()
    (choice,) = completion["choices"]
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["weather"]
    assert choice["finish_reason"] == "tool_calls"
    assert completion["usage"]["completion_tokens"] <= len(encode(FIRST))
    assert api.engine.aborts[0][1], "a normal end: what it has computed stays"
    assert api.engine.active == []


async def test_logprobs_are_those_of_the_tokens(saying):
    choice = (await saying(FIRST).chat(tools=TOOLS, logprobs=True)).json()["choices"][0]
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == FIRST


async def test_markers_that_are_special_tokens_are_seen(saying):
    special = copy.deepcopy(tokenizer())
    special.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "<|other|>"]})
    marker, other = special.convert_tokens_to_ids(["[TOOL_CALLS]", "<|other|>"])
    engine = ScriptedEngine(held=True)
    service = ProgramService(
        [ServedModel(MODEL, special, engine, 1700000000, tool_call_parser="mistral")],
        ServiceConfig(prefill_ahead=False),
    )
    api = Api(engine, service)
    body = {"messages": USER, "tools": TOOLS, "stream": False}

    for fields in ({}, {"tools": None}):
        task = asyncio.create_task(api.post(CHAT, {**body, **fields}))
        await until(lambda: engine.active)
        text = '[{"name": "weather", "arguments": {"a": 1}}]'
        engine.deliver(engine.active[0], [*encode("Hm."), other, marker, *encode(text), EOS], "stop", cached_tokens=0)
        choice = (await task).json()["choices"][0]
        if fields:
            assert choice["message"]["content"] == f"Hm.{text}", "special tokens have no text"
        else:
            assert choice["message"]["content"] == "Hm."
            assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"a": 1}'}
    task = asyncio.create_task(api.post(CHAT, {**body, "tool_choice": "required"}))
    await until(lambda: engine.active)
    assert f"<[{marker}]>" in engine.requests[-1].sampling.grammar
    engine.deliver(engine.active[0], [EOS], "stop", cached_tokens=0)
    await task
    await api.http.aclose()
    await service.close()


async def grammar_of(api, **fields):
    response = await api.chat(tools=fields.pop("tools", TOOLS), max_tokens=3, **fields)
    assert response.status_code == 200, response.text
    return api.engine.requests[-1].sampling.grammar


async def test_what_must_be_is_a_grammar(api):
    assert await grammar_of(api) is None
    assert await grammar_of(api, tool_choice="auto") is None
    required = await grammar_of(api, tool_choice="required")
    named = await grammar_of(api, tool_choice=NAMED)
    assert "weather" in required
    assert "now" in required
    assert "weather" not in named
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
    some = await grammar_of(api, tool_choice=allowed)
    assert "TEXT" in some
    assert "weather" not in some
    strict = copy.deepcopy(TOOLS)
    strict[0]["function"]["strict"] = True
    assert "TEXT" in await grammar_of(api, tools=strict)
    assert "TEXT" not in await grammar_of(api, response_format={"type": "json_object"})
    assert "json_object" not in await grammar_of(api, response_format={"type": "text"}, tool_choice="required")


def choosing(**fields):
    return {"tools": TOOLS, **fields}


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"tools": []}, "tools", "at least 1"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name", "so is that of tools[0]"),
        ({"tools": [{**WEATHER, "strict": True}]}, "tools[0].strict", "not a known field"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
            "Arguments are an object",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": [1]}}}]},
            "tools[0].function.parameters",
            "by its name",
        ),
        ({"tool_choice": "auto"}, "tool_choice", "there are no tools"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls", "there are no tools"),
        (choosing(tool_choice="any"), "tool_choice", "'none', 'auto' or 'required'"),
        (
            choosing(tool_choice={"type": "function", "function": {"name": "x"}}),
            "tool_choice.function.name",
            "Accepted: 'weather', 'now'",
        ),
        (
            choosing(
                tool_choice={
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [NAMED, {"type": "function", "function": {"name": "x"}}],
                    },
                }
            ),
            "tool_choice.allowed_tools.tools[1].function.name",
            "Accepted: 'weather', 'now'",
        ),
        (choosing(structured_outputs={"regex": "a"}), "structured_outputs", "so do tools"),
        (
            {"messages": [{"role": "user", "content": "Hi", "tool_calls": [made()]}]},
            "messages[0].tool_calls",
            "only an assistant",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "null was given"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "is missing"),
        (
            {"messages": [*USER, {"role": "user", "content": "x", "tool_call_id": "a"}]},
            "messages[1].tool_call_id",
            "only one of role tool",
        ),
        (
            {"messages": [*USER, {"role": "tool", "content": "x", "tool_call_id": "a"}]},
            "messages[1].tool_call_id",
            "no message before has a call with this id",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{**made(), "type": "custom"}]}]},
            "messages[0].tool_calls[0].type",
            "'function'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [made(arguments={})]}]},
            "messages[0].tool_calls[0].function.arguments",
            "valid string",
        ),
    ],
)
async def test_what_does_not_fit_is_refused_by_name(api, fields, param, text):
    request = {"messages": USER, **fields}
    for path, body, code, prefix in [
        (CHAT, request, "invalid_request", ""),
        (
            PROGRAMS,
            {"calls": [{"id": "a", "output": "o", "request": request}], "targets": [{"variable": "o"}]},
            "invalid_program",
            "calls[0].request.",
        ),
    ]:
        response = await api.post(path, body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, code, prefix + param), error
        assert text in error["message"]
    assert api.engine.requests == []


async def test_a_model_whose_form_is_not_known_takes_no_tools(api):
    unknown = copy.deepcopy(tokenizer())
    unknown.chat_template = "{{ tools | tojson }}" + unknown.chat_template
    object.__setattr__(api.service.models.find(None), "tokenizer", unknown)
    error = (await api.chat(tools=TOOLS)).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "tools")
    assert "--tool-call-parser" in error["message"]
    object.__setattr__(api.service.models.find(None), "tool_call_parser", "llama3_json")
    assert (await api.chat(tools=TOOLS, max_tokens=3)).status_code == 200
    error = (await api.chat(tools=TOOLS, response_format={"type": "json_object"})).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "response_format")


async def test_the_output_of_a_call_is_its_content(saying):
    api = saying(f"Let me see.\n{FIRST}")
    body = {
        "calls": [call("a", "Hi", tools=TOOLS, max_tokens=200), call("b", "$a.out", " So?")],
        "targets": [{"variable": "a.out"}, {"variable": "b.out"}],
        "stream": True,
    }
    events = [data for _, _, data in sse((await api.post(PROGRAMS, body)).text)]
    completed = next(e for e in events if e["type"] == "call.completed" and e["call_id"] == "a")["completion"]
    assert completed["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert completed["choices"][0]["finish_reason"] == "tool_calls"
    assert events[-1]["variables"]["a.out"] == "Let me see."
    assert "Let me see. So?" in api.engine.prompts()[1]


async def test_arguments_go_into_the_prompt_as_they_were_sent(api):
    messages = [
        *USER,
        {"role": "assistant", "tool_calls": [made(arguments='{"a": 1}')]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Fog"},
    ]
    assert (await api.post(CHAT, {"messages": messages, "max_tokens": 2})).status_code == 200
    (prompt,) = api.engine.prompts()
    assert f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': {'a': 1}})}\n</tool_call>" in prompt
    assert "<tool_response>\nFog\n</tool_response>" in prompt
