"""Wrong requests: each with its code and message, and without harm to a program that runs meanwhile."""

import asyncio
import json

import pytest

from server.service.harness import MAX_MODEL_LEN, call, until

USER = [{"role": "user", "content": "Hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
CHAT, COMPLETIONS, PROGRAMS = "/v1/chat/completions", "/v1/completions", "/v1/programs"


@pytest.fixture
async def busy(make_api):
    """The app with a program in flight, whose answer must be what it would be alone."""
    api = make_api()
    body = {"calls": [call("a", "Write", seed=5, max_tokens=30)], "targets": [{"variable": "a.out"}]}
    alone = (await api.post(PROGRAMS, body)).json()
    api.engine.hold()
    task = asyncio.create_task(api.post(PROGRAMS, body))
    await until(lambda: api.engine.active)
    api.engine.step()
    yield api
    assert len(api.engine.requests) == 2
    api.engine.release()
    assert (await task).json()["variables"] == alone["variables"]


async def refused(api, path, body, status=400):
    response = await api.http.post(path, content=body if isinstance(body, bytes) else json.dumps(body))
    error = response.json()["error"]
    assert response.status_code == status
    assert error.keys() == {"message", "type", "param", "code"}
    return error["code"], error["param"], error["message"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "The body is empty. Send a JSON object."),
        (b'{"a": 1,\n "b": }', "not valid JSON: Expecting value at line 2 column 7"),
        (b"[1, 2]", "The body is a JSON list. Send an object."),
        (b"null", "The body is a JSON null"),
        (b'"text"', "The body is a JSON string"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"user": "\\ud83e"}', "half a surrogate pair"),
        (b'{"temperature": NaN}', "NaN is not JSON"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "a number that is not accepted"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, PROGRAMS])
async def test_bodies_that_are_no_json_object(busy, path, body, text):
    code, _, message = await refused(busy, path, body)
    assert code == "invalid_request"
    assert text in message


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "Hi"}, "messages", '"Hi" was given'),
        (
            {"messages": [{"role": "robot", "content": ""}]},
            "messages[0].role",
            "'system', 'developer', 'user'",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "5 was given; content is a string",
        ),
        (
            {"messages": [*USER, {"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "messages[1].content[0].text",
            "3 was given",
        ),
        ({"temperature": 3}, "temperature", "3 was given; input should be less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", '"hot" was given'),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "1.5 was given"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stop": ["a", ""]}, "stop", "empty stop string"),
        ({"stop": [1]}, "stop[0]", "1 was given"),
        ({"stop": 5}, "stop", "valid string or input should be a valid list"),
        ({"stop": ["x"] * 17}, "stop", "17 stop strings"),
        ({"logit_bias": {"cat": 1}}, "logit_bias", "'cat' is not a token id"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "token id 9999; the model's ids are 0 to 399"),
        ({"top_logprobs": 3}, None, "only accepted with logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, None, "only accepted with stream: true"),
        ({"temprature": 1}, "temprature", "not a known field. Did you mean temperature?"),
        ({"banana": 1}, "banana", "not a known field. Leave it out."),
        ({"macaw": {"objective": "fast"}}, "macaw.objective", "'latency' or 'throughput'"),
        ({"macaw": {"grup": "x"}}, "macaw.grup", "Did you mean group?"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "Send one of them"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "min_tokens 5 is over max_tokens 4"),
        (
            {"messages": [{"role": "user", "content": [{"type": "variable", "variable": "v"}]}]},
            "messages",
            "a request without a program has none",
        ),
    ],
)
async def test_chat_fields(busy, fields, param, text):
    code, got_param, message = await refused(busy, CHAT, {"messages": USER} | fields)
    assert (code, got_param) == ("invalid_request", param)
    assert text in message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"functions": [{}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"guided_json": {}}, "guided_json"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["text"]}, "modalities"),
        ({"prediction": {}}, "prediction"),
        ({"store": True}, "store"),
        ({"service_tier": "auto"}, "service_tier"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"verbosity": "low"}, "verbosity"),
        ({"safety_identifier": "x"}, "safety_identifier"),
        ({"prompt_cache_key": "x"}, "prompt_cache_key"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "function", "content": "42"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "assistant", "content": "", "function_call": {}}]},
            "messages[0].function_call",
        ),
    ],
)
async def test_fields_that_are_not_served(busy, fields, param):
    code, got_param, message = await refused(busy, CHAT, {"messages": USER} | fields)
    assert (code, got_param) == ("unsupported_parameter", param)
    assert "which is not supported" in message
    assert param in message


@pytest.mark.parametrize("fields", [{"echo": True}, {"best_of": 2}, {"suffix": "end"}])
async def test_completion_fields_that_are_not_served(busy, fields):
    code, param, _ = await refused(busy, COMPLETIONS, {"prompt": "Hi"} | fields)
    assert (code, param) == ("unsupported_parameter", next(iter(fields)))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": USER, "tools": None, "store": False, "audio": None, "max_tokens": 3}),
        (CHAT, {"messages": USER, "response_format": {"type": "text"}, "max_tokens": 3}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi", "tool_calls": None}], "max_tokens": 3}),
        (COMPLETIONS, {"prompt": "Hi", "echo": False, "suffix": None, "best_of": 1, "max_tokens": 3}),
        (COMPLETIONS, {"prompt": "Hi", "n": 2, "best_of": 2, "max_tokens": 3}),
    ],
)
async def test_fields_that_are_not_used_are_accepted(api, path, body):
    assert (await api.post(path, body)).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({}, "prompt", "a prompt is a string, a list of strings"),
        ({"prompt": 5}, "prompt", "5 was given; a prompt is a string"),
        ({"prompt": []}, "prompt", "[] was given"),
        ({"prompt": [1, "a"]}, None, "a prompt is a string"),
        ({"prompt": [400]}, "prompt", "token id 400"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        ({"prompt": ""}, "prompt", "The prompt is empty"),
        ({"prompt": ["Hi", ""]}, "prompt", "The prompt is empty"),
        ({"prompt": "Hi", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        (
            {"prompt": [{"type": "variable", "variable": "v"}]},
            "prompt",
            "a request without a program has none",
        ),
    ],
)
async def test_prompts(busy, body, param, text):
    code, got_param, message = await refused(busy, COMPLETIONS, body)
    assert code == "invalid_request"
    assert got_param == param or (param is None and got_param.startswith("prompt"))
    assert text in message


async def test_the_context_is_too_short(busy):
    long = [{"role": "user", "content": "word " * MAX_MODEL_LEN}]
    for body in (
        {"messages": long},
        {"messages": USER, "max_tokens": MAX_MODEL_LEN},
        {"messages": long, "stream": True},
    ):
        code, _, message = await refused(busy, CHAT, body)
        assert code == "context_length_exceeded"
        assert f"model's context of {MAX_MODEL_LEN}" in message


def one(**fields):
    return {"calls": [call("a", "Hi")], "targets": [{"variable": "a.out"}]} | fields


@pytest.mark.parametrize(
    ("body", "code", "param", "text"),
    [
        ({}, "invalid_program", "targets", "no targets"),
        (one(calls=5), "invalid_program", "calls", "5 was given"),
        (one(calls=[call("a", "Hi"), {"id": "b"}]), "invalid_program", "calls[1].output", "is missing"),
        (
            one(calls=[call("a", "Hi", temperature=9)]),
            "invalid_program",
            "calls[0].request.temperature",
            "9 was given",
        ),
        (
            one(calls=[call("a", "Hi", topp=1)]),
            "invalid_program",
            "calls[0].request.topp",
            "Did you mean top_p?",
        ),
        (
            one(
                calls=[
                    {
                        "id": "a",
                        "output": "o",
                        "request": {"messages": [{"role": "user", "content": [IMAGE]}]},
                    }
                ]
            ),
            "invalid_program",
            "calls[0].request.messages[0].content[0].type",
            "text only",
        ),
        (
            one(calls=[call("a", "Hi", tools=[{"type": "custom"}])]),
            "invalid_program",
            "calls[0].request.tools[0].type",
            "not supported",
        ),
        (
            one(calls=[call("a", "Hi", stream=True)]),
            "invalid_program",
            "calls[0].request.stream",
            "program's own",
        ),
        (
            one(calls=[{"id": "a", "output": "o", "request": {"prompt": [1, 2]}}]),
            "invalid_program",
            "calls[0].request.prompt",
            "token ids",
        ),
        (
            one(calls=[{"id": "a", "output": "a.out", "request": {"prompt": ""}}]),
            "invalid_program",
            "calls[0].request.prompt",
            "empty",
        ),
        (
            one(calls=[{"id": "a", "output": "o", "request": {}}]),
            "invalid_program",
            "calls[0].request",
            "messages",
        ),
        (one(variables={"v": {}}), "invalid_program", "variables.v", '"external": true'),
        (one(open=True), "invalid_program", "stream", 'Set "stream": true'),
        (one(variables={"v": {"external": True}}), "invalid_program", "stream", "external variables"),
        (
            one(targets=[{"variable": "b"}]),
            "unknown_variable",
            "targets[0].variable",
            "'b' is not in the program",
        ),
        (
            one(targets=[{"variable": "a.out", "deadline_ms": 0}]),
            "invalid_program",
            "targets[0].deadline_ms",
            "0",
        ),
        (
            one(transforms=[{"id": "t", "op": "upper", "inputs": ["a.out"], "output": "u"}]),
            "invalid_program",
            "transforms[0].op",
            "'join', 'strip'",
        ),
        (
            one(calls=[call("a", "$b.out"), call("b", "$a.out")]),
            "cycle",
            "calls[0]",
            "->",
        ),
        (one(idempotency="x"), "invalid_program", "idempotency", "Did you mean idempotency_key?"),
    ],
)
async def test_programs(busy, body, code, param, text):
    got_code, got_param, message = await refused(busy, PROGRAMS, body)
    assert (got_code, got_param) == (code, param)
    assert text in message


async def test_unknown_models(busy):
    for path, body, param in [
        (CHAT, {"messages": USER, "model": "gpt-9"}, "model"),
        (PROGRAMS, one(model="gpt-9"), "model"),
        (PROGRAMS, one(calls=[call("a", "Hi", model="gpt-9")]), "calls[0].request.model"),
    ]:
        code, got_param, message = await refused(busy, path, body, status=404)
        assert (code, got_param) == ("unknown_model", param)
        assert "Served: 'tiny/scripted'" in message


async def test_routes_and_methods(busy):
    response = await busy.http.get("/v1/embeddings")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert "/v1/chat/completions" in response.json()["error"]["message"]
    response = await busy.http.get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert "accepted: POST" in response.json()["error"]["message"]
    response = await busy.http.get(f"{PROGRAMS}/prog-0")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
