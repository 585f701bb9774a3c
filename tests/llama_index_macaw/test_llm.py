"""`Macaw` by itself: what it sends, what it returns, how it is copied, and which connections it uses."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from llama_index.core import Settings
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.llms import LLM, ChatMessage
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from pydantic import BaseModel

import scripted_macaw_server
from llama_index.llms.macaw import Macaw
from llama_index_macaw.observing import run_async
from llama_index_macaw.ways import MESSAGES, WAYS, gathered, text_of
from macaw.connections import shared_async_client
from macaw.errors import ContextLengthError, EngineFailedError
from macaw.protocol import ChatCompletionRequest, CompletionRequest
from scripted_macaw_server import Recorder

KNOWN: dict[str, Any] = {"context_window": 1000, "is_chat_model": True, "is_function_calling_model": False}
EXTENSIONS: dict[str, Any] = {
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "ignore_eos": True,
    "min_tokens": 1,
    "stop_token_ids": [9],
}
SAMPLING: dict[str, Any] = {"top_p": 0.9, "seed": 3, "stop": ["x"], "presence_penalty": 0.1, "logit_bias": {"5": 1}}


class Capture(httpx.BaseTransport):
    """Keeps requests, and answers nothing."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(400, json={"error": {"message": "no", "type": "t", "code": "c"}})

    def bodies(self) -> Iterator[str]:
        return (request.content.decode() for request in self.requests)


@pytest.fixture
def capture() -> Iterator[tuple[Capture, httpx.Client]]:
    transport = Capture()
    with httpx.Client(transport=transport) as client:
        yield transport, client


# -----------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_chat_model", [True, False])
def test_answers(way: str, is_chat_model: bool, server_url: str, recorder: Recorder) -> None:
    llm = Macaw(api_base=server_url, temperature=0, is_chat_model=is_chat_model)
    responses = WAYS[way](llm)
    last = responses[-1]
    whole = text_of(last)
    assert "says" in whole
    if "stream" in way:
        assert len(responses) > 3
        assert "".join(response.delta or "" for response in responses) == whole
    usage = last.raw.usage
    counts = last.additional_kwargs or last.message.additional_kwargs
    assert counts == {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "cached_tokens": usage.prompt_tokens // 2,
    }
    assert recorder.requests == {"chat" if is_chat_model else "completion": 1}
    [seen] = (json.loads(prompt) for prompt in recorder.prompts)
    if is_chat_model:
        sent = [(message["role"], message["content"]) for message in seen["messages"]]
        assert sent == ([("user", "Hello, you")] if "complete" in way else [(m.role, m.content) for m in MESSAGES])
    else:
        expected = "Hello, you" if "complete" in way else llm.messages_to_prompt(MESSAGES)
        assert seen["prompt"] == expected


def test_token_counting(server_url: str, recorder: Recorder) -> None:
    counter = TokenCountingHandler(tokenizer=str.split)
    llm = Macaw(api_base=server_url, callback_manager=CallbackManager([counter]))
    for way in ("chat", "stream_chat", "complete", "stream_complete"):
        counter.reset_counts()
        last = WAYS[way](llm)[-1]
        usage = last.raw.usage
        assert counter.prompt_llm_token_count == usage.prompt_tokens, way
        assert counter.completion_llm_token_count == usage.completion_tokens, way
        assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2


@pytest.mark.parametrize("way", WAYS)
def test_callbacks(way: str, server_url: str, recorder: Recorder) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    WAYS[way](Macaw(api_base=server_url, callback_manager=CallbackManager([debug])))
    [(start, end)] = debug.get_event_pairs(CBEventType.LLM)
    assert start.id_ == end.id_
    assert "secret" not in str(start.payload)


class Answer(BaseModel):
    name: str
    length: int


def test_structured(llm: Macaw, recorder: Recorder) -> None:
    prompt = PromptTemplate("About {topic} JSON")
    answer = llm.structured_predict(Answer, prompt, topic="x")
    assert isinstance(answer, Answer)
    assert run_async(llm.astructured_predict(Answer, prompt, topic="x")) == answer
    assert list(llm.stream_structured_predict(Answer, prompt, topic="x"))[-1] == answer
    assert llm.as_structured_llm(Answer).chat([ChatMessage("About x JSON")]).raw == answer
    assert recorder.requests == {"chat": 4}
    [seen] = recorder.prompts
    schema = json.loads(seen)["response_format"]
    assert schema["type"] == "json_schema"
    assert set(schema["json_schema"]["schema"]["properties"]) == {"name", "length"}


def test_settings(server_url: str, recorder: Recorder) -> None:
    llm = Macaw(api_base=server_url)
    try:
        Settings.llm = llm
        assert Settings.llm is llm
        assert Settings.llm.predict(PromptTemplate("Hello, {who}"), who="you") == llm.complete("Hello, you").text
    finally:
        Settings._llm = None


# -----------------------------------------------------------------------------------------------------------
# What is sent


@pytest.mark.parametrize("how", ["fields", "call"])
@pytest.mark.parametrize("is_chat_model", [True, False])
def test_every_parameter_is_one_of_the_protocols(
    how: str, is_chat_model: bool, capture: tuple[Capture, httpx.Client]
) -> None:
    transport, client = capture
    given = {**EXTENSIONS, "additional_kwargs": SAMPLING} if how == "fields" else {}
    called = {} if how == "fields" else {**EXTENSIONS, **SAMPLING}
    llm = Macaw(model="m", http_client=client, max_retries=0, **{**KNOWN, "is_chat_model": is_chat_model}, **given)
    with pytest.raises(openai.BadRequestError):
        llm.chat(MESSAGES, **called)
    with pytest.raises(openai.BadRequestError):
        list(llm.stream_chat(MESSAGES, **called))
    kind = ChatCompletionRequest if is_chat_model else CompletionRequest
    plain, streamed = [kind.model_validate_json(body) for body in transport.bodies()]
    sent = plain.model_dump(exclude_unset=True, exclude={"messages", "prompt", "stream"})
    assert sent == {**EXTENSIONS, **SAMPLING, "model": "m", "temperature": 0.1, "max_tokens": 250}
    assert streamed.stream_options is not None
    assert streamed.stream_options.include_usage


@pytest.mark.parametrize(
    ("given", "call", "expected"),
    [
        ({}, {}, {"max_tokens": 250}),
        ({"context_window": 100_000}, {}, {"max_tokens": 1024}),
        ({"max_tokens": 7}, {}, {"max_tokens": 7}),
        ({"max_tokens": 7}, {"max_tokens": 5}, {"max_tokens": 5}),
        ({"additional_kwargs": {"max_tokens": 6}}, {}, {"max_tokens": 6}),
        ({"max_tokens": 7}, {"max_completion_tokens": 5}, {"max_completion_tokens": 5}),
    ],
)
def test_a_length_is_always_sent(
    given: dict[str, Any], call: dict[str, Any], expected: dict[str, int], capture: tuple[Capture, httpx.Client]
) -> None:
    transport, client = capture
    llm = Macaw(model="m", http_client=client, max_retries=0, **{**KNOWN, **given})
    with pytest.raises(openai.BadRequestError):
        llm.chat(MESSAGES, **call)
    [body] = map(json.loads, transport.bodies())
    assert {name: value for name, value in body.items() if name.startswith("max_")} == expected


def test_own_extra_body_is_kept(capture: tuple[Capture, httpx.Client]) -> None:
    transport, client = capture
    own = {"extra_body": {"min_p": 0.2, "macaw": {"app": "mine"}}}
    for llm, call in (
        (Macaw(model="m", http_client=client, max_retries=0, additional_kwargs=own, min_p=0.1, **KNOWN), {}),
        (Macaw(model="m", http_client=client, max_retries=0, min_p=0.1, **KNOWN), own),
    ):
        with pytest.raises(openai.BadRequestError):
            llm.chat(MESSAGES, **call)
    for body in map(json.loads, transport.bodies()):
        assert (body["min_p"], body["macaw"]) == (0.2, {"app": "mine"})


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="Macaw has no top_kk"):
        Macaw(model="m", top_kk=3)


def test_nothing_of_openais_environment(monkeypatch: pytest.MonkeyPatch, capture: tuple[Capture, httpx.Client]) -> None:
    for name in ("API_KEY", "API_BASE", "BASE_URL", "ORG_ID", "PROJECT_ID", "API_VERSION", "ADMIN_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", "http://openai.invalid/v1")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: openai.invalid")
    monkeypatch.delenv("MACAW_API_KEY", raising=False)
    monkeypatch.delenv("MACAW_BASE_URL", raising=False)
    transport, client = capture
    with pytest.raises(openai.BadRequestError):
        Macaw(model="m", http_client=client, max_retries=0).complete("hi")
    [request] = transport.requests
    assert str(request.url).startswith("http://127.0.0.1:8000/v1/")
    assert "openai.invalid" not in str(request.headers)
    assert request.headers["authorization"] == "Bearer none"
    llm = Macaw(model="m")
    assert "openai.invalid" not in repr(llm) + str(llm.to_dict())


@pytest.mark.parametrize("url", ["http://macaw.invalid", "http://macaw.invalid/", "http://macaw.invalid/v1"])
def test_server_and_key_come_from_macaws_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACAW_API_KEY", "mine")
    monkeypatch.setenv("MACAW_BASE_URL", url)
    llm = Macaw(model="m")
    assert (llm.api_base, llm.api_key) == ("http://macaw.invalid/v1", "mine")
    assert Macaw(base_url="http://other.invalid").api_base == "http://other.invalid/v1"


# -----------------------------------------------------------------------------------------------------------
# What the server is asked


def test_metadata_is_asked_once_and_late(server_url: str, recorder: Recorder) -> None:
    llm = Macaw(api_base=server_url)
    assert recorder.model_reads == 0
    metadata = llm.metadata
    assert (metadata.model_name, metadata.context_window, metadata.num_output) == ("m", 4096, 1024)
    assert metadata.is_chat_model
    assert not metadata.is_function_calling_model
    llm.complete("Hello")
    llm.chat(MESSAGES)
    assert recorder.model_reads == 1


def test_what_is_passed_is_not_asked_for(recorder: Recorder) -> None:
    llm = Macaw(
        model="x",
        api_base="http://127.0.0.1:9/v1",
        context_window=100,
        max_tokens=3,
        is_chat_model=False,
        is_function_calling_model=True,
    )
    metadata = llm.metadata
    assert (metadata.model_name, metadata.context_window, metadata.num_output) == ("x", 100, 3)
    assert (metadata.is_chat_model, metadata.is_function_calling_model) == (False, True)


def test_a_model_without_chat_template_is_prompted(
    server_url: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scripted_macaw_server.MODEL, "has_chat_template", False)
    assert Macaw(api_base=server_url).chat(MESSAGES).message.content
    assert recorder.requests == {"completion": 1}


def test_another_servers_model(server_url: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says no more than a name: then LlamaIndex's own default holds."""
    for name in scripted_macaw_server.MODEL:
        monkeypatch.setitem(scripted_macaw_server.MODEL, name, None)
    metadata = Macaw(api_base=server_url).metadata
    assert (metadata.context_window, metadata.is_chat_model) == (3900, True)


def test_a_model_that_is_not_served(server_url: str, recorder: Recorder) -> None:
    with pytest.raises(openai.APIError, match=r"'other' is not served; served by http.* are: m\."):
        Macaw(model="other", api_base=server_url).metadata.context_window  # noqa: B018


def test_no_server() -> None:
    llm = Macaw(api_base="http://127.0.0.1:9/v1", max_retries=0)
    for way in WAYS.values():
        with pytest.raises(
            openai.APIConnectionError, match=r"No Macaw server at http://127\.0\.0\.1:9/v1/.*macaw serve"
        ):
            way(llm)


@pytest.mark.parametrize("way", WAYS)
def test_errors_are_openais(way: str, llm: Macaw, recorder: Recorder) -> None:
    def fail(prompt: str) -> str:
        raise error

    recorder.script = fail
    error: Exception = ContextLengthError("Context of 12 tokens is over the model's 10. Shorten the prompt.")
    with pytest.raises(openai.BadRequestError, match="over the model's 10") as caught:
        WAYS[way](llm)
    assert caught.value.code == "context_length_exceeded"
    error = EngineFailedError("The engine died.")
    with pytest.raises(openai.InternalServerError, match="The engine died"):
        WAYS[way](llm)


# -----------------------------------------------------------------------------------------------------------
# The standard checks of integrations, and copies


def test_class() -> None:
    bases = [base.__name__ for base in Macaw.__mro__]
    assert {BaseLLM.__name__, LLM.__name__, FunctionCallingLLM.__name__, "OpenAI", "OpenAILike"} <= set(bases)
    assert Macaw.class_name() == "Macaw"


def test_written_and_read(server_url: str, recorder: Recorder) -> None:
    llm = Macaw(api_base=server_url, api_key="secret", default_headers={"X-Key": "secret"}, top_k=3, max_tokens=9)
    data = json.loads(llm.to_json())
    assert data["class_name"] == "Macaw"
    assert "secret" not in json.dumps(data) + repr(llm) + str(llm)
    again = Macaw.from_dict(data)
    assert (again.api_base, again.top_k, again.max_tokens) == (llm.api_base, 3, 9)
    assert again.context_window is None, "what the server said is not written"
    assert again.api_key != "secret"
    assert again.complete("Hello").text


def test_copies(server_url: str, recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    """Of a model that is in use."""
    llm = Macaw(api_base=server_url, api_key="secret", top_k=3, temperature=0)
    answer = llm.complete("Hello").text
    run_async(llm.acomplete("Hello"))
    for one in (llm.model_copy(), copy.copy(llm), copy.deepcopy(llm), pickle.loads(pickle.dumps(llm))):
        assert (one.top_k, one.api_key) == (3, "secret")
        assert one.complete("Hello").text == answer
        assert run_async(one.acomplete("Hello")).text == answer
    assert "_client" not in caplog.text


def test_a_model_with_its_own_client_is_copied(server_url: str, recorder: Recorder) -> None:
    with httpx.Client() as client:
        llm = Macaw(api_base=server_url, http_client=client)
        assert copy.deepcopy(llm).complete("Hello").text
        assert not client.is_closed


# -----------------------------------------------------------------------------------------------------------
# Connections


def test_event_loops_come_and_go(server_url: str, recorder: Recorder) -> None:
    """Connections of a loop end with it, and the next loop has its own."""
    llm = Macaw(api_base=server_url)
    for _ in range(3):
        assert run_async(llm.acomplete("hi")).text
        assert run_async(gathered(llm.astream_complete("hi")))
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(llm.acomplete("hi")).text
        loop.close()  # with no more ado
    transport = shared_async_client()._transport
    assert not [loop for loop in transport._pools if loop.is_closed()]  # type: ignore[attr-defined]


def test_clients_that_are_not_reused(server_url: str, recorder: Recorder) -> None:
    llm = Macaw(api_base=server_url, reuse_client=False)
    for _ in range(2):
        assert llm.complete("hi").text
        assert run_async(llm.acomplete("hi")).text
    assert Macaw(api_base=server_url).complete("hi").text, "the shared connections are still open"


def test_timeout_is_long() -> None:
    llm = Macaw(model="m")
    assert llm.timeout == 600
    assert llm._get_client().timeout == 600
    assert Macaw(model="m", timeout=3)._get_aclient().timeout == 3
