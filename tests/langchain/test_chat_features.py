"""What `ChatMacaw` has beside requests and answers: tools, structured output, profile, token counts, facts."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import httpx
import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.exceptions import ContextOverflowError, OutputParserException
from langchain_core.messages import HumanMessage
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.tools import tool
from openai import OpenAIError
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as BaseModelV1
from typing_extensions import TypedDict

from conftest import TENANTS
from langchain_macaw import ChatMacaw, compile
from langchain_macaw.structured import response_format
from macaw_server.serve import LocalServer


class Joke(BaseModel):
    """A joke."""

    setup: str = Field(description="question", max_length=8)
    punchline: str | None = Field(default=None, max_length=8)


class JokeDict(TypedDict):
    """A joke."""

    setup: Literal["why", "how"]


class JokeV1(BaseModelV1):
    """A joke."""

    score: Literal[1, 2]


Digit = Annotated[int, Field(ge=0, le=9)]
"""Numbers and strings are bounded: the model has random weights, and would not end them."""


@tool
def add(a: Digit, b: Digit) -> int:
    """Add."""
    return a + b


@tool
def now() -> str:
    """The time."""
    return "late"


def sent(llm: Any, prompt: str = "hi", **kwargs: Any) -> dict[str, Any]:
    """The body of the request that a bound model makes."""
    payload: dict[str, Any] = llm.bound._get_request_payload(prompt, **{**llm.kwargs, **kwargs})
    return {**payload, **payload.pop("extra_body", {})}


@pytest.fixture
def chat(local_server: LocalServer) -> ChatMacaw:
    return ChatMacaw(
        model="macaw-demo", base_url=f"{local_server.url}/v1", api_key=TENANTS[0], temperature=0, max_tokens=400
    )


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("any", "required"),
        ("required", "required"),
        (True, "required"),
        ("add", {"type": "function", "function": {"name": "add"}}),
        ({"type": "function", "function": {"name": "now"}}, {"type": "function", "function": {"name": "now"}}),
    ],
)
def test_every_tool_choice_is_sent_and_served(chat: ChatMacaw, choice: Any, expected: Any) -> None:
    llm = chat.bind_tools([add, now], tool_choice=choice, parallel_tool_calls=False)
    body = sent(llm)
    assert (body["tool_choice"], body["parallel_tool_calls"], len(body["tools"])) == (expected, False, 2)
    answer = llm.invoke("hi")
    if expected in ("auto", "none"):
        assert isinstance(answer.content, str)
    else:
        (called,) = answer.tool_calls
        assert called["name"] in (["add", "now"] if expected == "required" else [expected["function"]["name"]])
        assert all(isinstance(value, int) for value in called["args"].values())
        whole = None
        for chunk in llm.stream("hi"):
            whole = chunk if whole is None else whole + chunk
        assert whole is not None
        assert [(c["name"], c["args"]) for c in whole.tool_calls] == [(called["name"], called["args"])]


@pytest.mark.parametrize(("choice", "strict"), [(None, None), (False, True)])
def test_no_choice_is_none(chat: ChatMacaw, choice: Any, strict: bool | None) -> None:
    body = sent(chat.bind_tools([add], tool_choice=choice, strict=strict))
    assert "tool_choice" not in body
    assert body["tools"][0]["function"].get("strict") == strict


def test_a_tool_that_is_not_there_is_refused_by_the_server(chat: ChatMacaw) -> None:
    with pytest.raises(OpenAIError, match="tool_choice"):
        chat.bind_tools([add], tool_choice="subtract").invoke("hi")


@pytest.mark.parametrize("schema", [Joke, JokeDict, JokeV1, Joke.model_json_schema()])
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_instance(chat: ChatMacaw, schema: Any, method: Any) -> None:
    structured = chat.with_structured_output(schema, method=method)
    answer = structured.invoke("A joke.")
    assert isinstance(answer, schema if schema in (Joke, JokeV1) else dict)
    *_, last = structured.stream("A joke.")
    assert last == answer


@pytest.mark.parametrize("tools", [[], [now]])
def test_an_agents_response_format_is_the_servers_grammar(chat: ChatMacaw, tools: Any) -> None:
    """`create_agent` reads from the profile that the server can do so."""
    agent = create_agent(chat, tools, response_format=JokeDict)
    assert agent.invoke({"messages": [("user", "A joke.")]})["structured_response"]["setup"] in ("why", "how")


def test_structured_output_keeps_the_raw_message_and_the_error(chat: ChatMacaw) -> None:
    good = chat.with_structured_output(Joke, include_raw=True).invoke("A joke.")
    assert isinstance(good, dict)
    assert (good["parsed"], good["parsing_error"]) == (Joke.model_validate_json(good["raw"].text), None)
    cut = chat.model_copy(update={"max_tokens": 3}).with_structured_output(Joke, include_raw=True).invoke("A joke.")
    assert isinstance(cut, dict)
    assert cut["parsed"] is None
    assert isinstance(cut["parsing_error"], OutputParserException)
    assert "Raise max_tokens" in str(cut["parsing_error"])


@pytest.mark.parametrize("schema", [Joke, Joke.model_json_schema()])
def test_what_is_cut_off_is_no_answer(chat: ChatMacaw, schema: Any) -> None:
    structured = chat.model_copy(update={"max_tokens": 3}).with_structured_output(schema)
    with pytest.raises(OutputParserException, match="cut off"):
        structured.invoke("A joke.")
    with pytest.raises(OutputParserException, match="cut off"):
        list(structured.stream("A joke."))


def test_json_mode(chat: ChatMacaw) -> None:
    assert sent(chat.with_structured_output(method="json_mode").first)["response_format"] == {"type": "json_object"}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="strict is for"):
        chat.with_structured_output(Joke, method="json_mode", strict=True)
    with pytest.raises(ValueError, match="needs a schema"):
        chat.with_structured_output()
    with pytest.raises(ValueError, match="is none"):
        chat.with_structured_output(Joke, method="yaml")  # type: ignore[arg-type]


def test_structured_output_is_part_of_a_compiled_chain(chat: ChatMacaw) -> None:
    paths: list[str] = []
    with httpx.Client(event_hooks={"request": [lambda request: paths.append(request.url.path)]}) as http:
        llm = ChatMacaw(**{**chat.model_dump(), "http_client": http, "api_key": TENANTS[0]})
        chain = llm.with_structured_output(Joke)
        assert compile(chain).invoke("A joke.") == chain.invoke("A joke.")
    assert paths == ["/v1/programs", "/v1/chat/completions"]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"title": "a b", "type": "object", "properties": {"x": {}}}, False),
        ({"title": "a", "type": "object", "properties": {"x": {}}, "additionalProperties": True}, True),
        ({"title": "a", "type": "object", "allOf": [{"properties": {"x": {}}}], "properties": {"y": {}}}, None),
        ({"title": "a", "type": "object", "properties": {"properties": {"type": "string"}}}, False),
    ],
)
def test_objects_are_closed_where_nothing_else_is_said(schema: dict[str, Any], expected: bool | None) -> None:
    named = response_format(schema)["json_schema"]
    assert named["schema"].get("additionalProperties") is expected
    assert "additionalProperties" not in named["schema"]["properties"]
    assert named["name"] in ("a_b", "a")


# -----------------------------------------------------------------------------------------------------------


class Counted(httpx.BaseTransport):
    """Notes paths, and passes requests on."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._wire = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        return self._wire.handle_request(request)

    def close(self) -> None:
        self._wire.close()


@pytest.fixture
def counted(chat: ChatMacaw) -> Iterator[tuple[ChatMacaw, Counted]]:
    wire = Counted()
    with httpx.Client(transport=wire) as http:
        yield (
            ChatMacaw(model=chat.model_name, base_url=chat.openai_api_base, api_key=TENANTS[0], http_client=http),
            wire,
        )


def test_profile_is_asked_for_once_and_not_before(counted: tuple[ChatMacaw, Counted]) -> None:
    llm, wire = counted
    repr(llm)
    llm.model_copy()
    assert wire.paths == []
    assert llm.profile is not None
    assert llm.profile["max_input_tokens"] == 2048
    assert llm.profile["tool_calling"] is llm.profile["structured_output"] is True
    assert llm.model_copy().profile == llm.profile
    assert wire.paths == ["/v1/models/macaw-demo"]


def test_profile_can_be_given_and_a_subclass_has_it(counted: tuple[ChatMacaw, Counted]) -> None:
    class Own(ChatMacaw):
        more: int = 1

    llm, wire = counted
    assert ChatMacaw(model="m", profile={"max_input_tokens": 5}).profile == {"max_input_tokens": 5}
    own = Own(model="macaw-demo", base_url=llm.openai_api_base, api_key=TENANTS[0], http_client=llm.http_client)
    assert own.profile == llm.profile
    own.profile = {"max_input_tokens": 7}
    assert own.profile == {"max_input_tokens": 7}
    assert len(wire.paths) == 2
    assert pickle.loads(pickle.dumps(ChatMacaw(model="m", profile={"name": "x"}))).profile == {"name": "x"}


def test_profile_of_a_server_that_is_not_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    assert ChatMacaw(model="m", base_url="http://127.0.0.1:1/v1", max_retries=0).profile is None
    assert "not known" in caplog.text


def test_tokens_are_the_servers(chat: ChatMacaw) -> None:
    messages = [HumanMessage("How many tokens are these?")]
    usage = chat.bind(max_tokens=1).invoke(messages).usage_metadata
    assert usage is not None
    assert chat.get_num_tokens_from_messages(messages) == usage["input_tokens"]
    with_tools = chat.bind_tools([add]).bind(max_tokens=1).invoke(messages).usage_metadata
    assert with_tools is not None
    assert chat.get_num_tokens_from_messages(messages, tools=[add]) == with_tools["input_tokens"]
    assert chat.get_num_tokens("How many") == len(chat.get_token_ids("How many")) > 0
    assert ChatMacaw(model="m", custom_get_token_ids=lambda text: [1, 2]).get_num_tokens("x") == 2


@pytest.mark.parametrize("way", ["invoke", "stream"])
async def test_answers_say_which_program_they_were_and_when(chat: ChatMacaw, way: str) -> None:
    if way == "invoke":
        answers: list[Any] = [chat.invoke("hi"), await chat.ainvoke("hi")]
    else:
        first, *rest = chat.stream("hi")
        afirst, *arest = [chunk async for chunk in chat.astream("hi")]
        answers = [sum(rest, first), sum(arest, afirst)]
    for answer in answers:
        facts = answer.response_metadata
        assert facts["model_name"] == "macaw-demo"
        assert facts["finish_reason"] in ("stop", "length")
        assert facts["program_id"].startswith("prog-")
        times = facts["timings"]
        assert 0 <= times["ready_ms"] <= times["started_ms"] <= times["first_token_ms"] <= times["completed_ms"]
    planned = compile(chat).invoke("hi").response_metadata
    assert planned["program_id"].startswith("prog-")
    assert planned["timings"]["completed_ms"] > 0


def test_a_prompt_that_is_too_long_is_langchains_error(chat: ChatMacaw) -> None:
    with pytest.raises(ContextOverflowError):
        chat.invoke("word " * 5000)


def test_cache_and_rate_limiter_are_langchains(counted: tuple[ChatMacaw, Counted]) -> None:
    llm, wire = counted
    cached = llm.model_copy(update={"cache": InMemoryCache(), "max_tokens": 2})
    assert cached.invoke("hi").text == cached.invoke("hi").text
    assert len(wire.paths) == 1
    limited = llm.model_copy(update={"rate_limiter": InMemoryRateLimiter(requests_per_second=1e6), "max_tokens": 2})
    assert limited.generate([[HumanMessage("a")], [HumanMessage("b")]]).generations
    assert len(wire.paths) == 3
    assert json.loads(json.dumps(wire.paths))
