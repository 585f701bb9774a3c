"""Constrained requests over HTTP: what reaches the engine, and what is refused before anything starts."""

import asyncio
import json

import pytest

from macaw_server.service.constraints import MAX_GRAMMAR_BYTES
from server.service.harness import call, encode, tokenizer, until

USER = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS, PROGRAMS = "/v1/chat/completions", "/v1/completions", "/v1/programs"
SCHEMA = {"type": "object", "properties": {"b": {"const": None}, "a": {"type": "string"}}}


def json_schema(schema, **fields):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}}


ACCEPTED = [
    {"response_format": {"type": "json_object"}},
    json_schema(SCHEMA),
    json_schema(SCHEMA, strict=True, description="A thing."),
    json_schema(SCHEMA, strict=None),
    {"structured_outputs": {"regex": "[0-9]+"}},
    {"structured_outputs": {"choice": ["yes", "no", "a.b|c\n/ü\"'"]}},
    {"structured_outputs": {"grammar": 'start: "a" | "(" start ")"'}},
]


@pytest.mark.parametrize("fields", ACCEPTED)
async def test_a_grammar_reaches_the_engine_by_every_way(api, fields):
    bodies = [
        (CHAT, {"messages": USER, **fields}),
        (COMPLETIONS, {"prompt": "Hi", **fields}),
        (PROGRAMS, {"calls": [call("a", "Hi", **fields)], "targets": [{"variable": "a.out"}]}),
        (
            PROGRAMS,
            {"calls": [call("a", "Hi"), call("b", "$a.out", **fields)], "targets": [{"variable": "b.out"}]},
        ),
    ]
    for path, body in bodies:
        response = await api.post(path, {"max_tokens": 3, **body} if path != PROGRAMS else body)
        assert response.status_code == 200, response.text
    grammars = {request.sampling.grammar for request in api.engine.requests}
    assert len(grammars - {None}) == 1
    assert [r.sampling.grammar is None for r in api.engine.requests] == [False, False, False, True, False]


async def test_a_schema_keeps_its_order_and_its_nulls(api):
    await api.chat(**json_schema(SCHEMA))
    grammar = json.loads(api.engine.requests[0].sampling.grammar)
    schema = grammar["grammars"][0]["json_schema"]
    assert json.dumps(schema["properties"]) == json.dumps(SCHEMA["properties"])


@pytest.mark.parametrize("fields", [{}, {"response_format": None}, {"response_format": {"type": "text"}}])
async def test_free_text_has_no_grammar(api, fields):
    assert (await api.chat(**fields)).status_code == 200
    assert api.engine.requests[0].sampling.grammar is None


def nested(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


BIG = "a" * (MAX_GRAMMAR_BYTES + 1)
FORMAT, STRUCTURED = "response_format", "structured_outputs"
IN_SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({FORMAT: {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
        ({FORMAT: {"type": "json_schema"}}, FORMAT, "type json_schema is without a json_schema"),
        ({FORMAT: {"type": "text", "json_schema": {"name": "x", "schema": {}}}}, FORMAT, "type text is with"),
        ({FORMAT: {"type": "json_schema", "json_schema": {"name": "x"}}}, IN_SCHEMA, "is missing"),
        (json_schema({}, name="no spaces"), "response_format.json_schema.name", "should match pattern"),
        (json_schema({}, banana=1), "response_format.json_schema.banana", "not a known field"),
        (json_schema({"type": "objekt"}), IN_SCHEMA, "cannot be compiled: Invalid type: objekt"),
        (json_schema({"type": "array", "uniqueItems": True}), IN_SCHEMA, 'Unimplemented keys: ["uniqueItems"]'),
        (json_schema({"minimum": 3, "maximum": 2, "type": "integer"}), IN_SCHEMA, "minimum (3) is greater"),
        (json_schema({"$ref": "#/$defs/nowhere"}), IN_SCHEMA, "'/$defs/nowhere' does not exist"),
        (json_schema({"type": "string", "pattern": "(?=a)"}), IN_SCHEMA, "look-around"),
        (json_schema({"x-guidance": {"lenient": True}}), IN_SCHEMA, "options are the server's"),
        (json_schema(nested(70)), IN_SCHEMA, "more than 64 levels"),
        (json_schema({"const": BIG}), IN_SCHEMA, f"at most {MAX_GRAMMAR_BYTES:,} are accepted"),
        (json_schema({"type": "object", "properties": {f"p{i}": {} for i in range(1500)}}), IN_SCHEMA, "max is 2000"),
        ({STRUCTURED: {}}, STRUCTURED, "exactly one of regex, choice and grammar"),
        ({STRUCTURED: {"regex": "a", "grammar": "b"}}, STRUCTURED, "exactly one"),
        ({STRUCTURED: {"regexp": "a"}}, "structured_outputs.regexp", "Did you mean regex?"),
        ({STRUCTURED: {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
        ({STRUCTURED: {"regex": r"[^\s\S]"}}, "structured_outputs.regex", "nothing matches it"),
        ({STRUCTURED: {"regex": r"(a)\1"}}, "structured_outputs.regex", "backreferences are not supported"),
        ({STRUCTURED: {"regex": BIG}}, "structured_outputs.regex", "at most"),
        ({STRUCTURED: {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({STRUCTURED: {"choice": ["a", ""]}}, "structured_outputs.choice[1]", "at least 1"),
        ({STRUCTURED: {"grammar": "start: foo"}}, "structured_outputs.grammar", 'unknown name: "foo"'),
        ({STRUCTURED: {"grammar": "start: <|role|>"}}, "structured_outputs.grammar", "unknown special token"),
        ({STRUCTURED: {"regex": "a"}, FORMAT: {"type": "json_object"}}, None, "send one"),
    ],
)
async def test_what_cannot_be_compiled_is_refused_before_anything_starts(api, fields, param, text):
    for path, body, code, prefix in [
        (CHAT, {"messages": USER, **fields}, "invalid_request", ""),
        (COMPLETIONS, {"prompt": "Hi", **fields}, "invalid_request", ""),
        (
            PROGRAMS,
            {"calls": [call("a", "Hi"), call("b", "$a.out", **fields)], "targets": [{"variable": "b.out"}]},
            "invalid_program",
            "calls[1].request",
        ),
    ]:
        response = await api.post(path, body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, code), error
        assert text in error["message"]
        assert error["param"] == (".".join(filter(None, (prefix, param))) or None)
    assert api.engine.requests == []


@pytest.mark.parametrize("rule", ["r{i}: r{j}\n", 'R{i}:"b"R{j}\n'])
async def test_a_grammar_of_thousands_of_rules_in_a_row_does_not_overflow_the_stack(api, rule):
    first = rule[0] + "0"
    rules = "".join(rule.format(i=i, j=i + 1) for i in range(4000))
    grammar = f'start: {first}\n{rules}{rule[0]}4000: "a"\n'
    response = await api.chat(structured_outputs={"grammar": grammar}, max_tokens=3)
    assert response.status_code == 200, response.text


async def test_a_tokenizer_that_is_not_fast_cannot_be_constrained(make_api):

    class Slow:
        def __getattr__(self, name):
            if name == "backend_tokenizer":
                raise AttributeError(name)
            return getattr(tokenizer(), name)

    api = make_api()
    model = api.service.models.find(None)
    object.__setattr__(model, "tokenizer", Slow())
    response = await api.chat(response_format={"type": "json_object"})
    assert response.json()["error"]["code"] == "unsupported_parameter"
    assert (await api.chat(max_tokens=3)).status_code == 200


async def test_an_answer_that_completes_its_grammar_keeps_its_last_token(api):
    api.engine.hold()

    task = asyncio.create_task(api.chat(structured_outputs={"regex": "one two"}))
    await until(lambda: api.engine.active)
    api.engine.deliver(api.engine.active[0], encode("one two"), "stop", cached_tokens=0)
    completion = (await task).json()
    assert completion["choices"][0]["message"]["content"] == "one two"
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["usage"]["completion_tokens"] == len(encode("one two"))
