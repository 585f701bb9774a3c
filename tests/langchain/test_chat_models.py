"""`ChatMacaw` by itself: what it sends, what it returns, and which connections it uses."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from typing import Any

import httpx
import pytest
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage

from langchain_macaw import ChatMacaw, compile
from macaw.connections import shared_async_client
from macaw.protocol import ChatCompletionRequest
from scripted_macaw_server import Recorder

EVERYTHING: dict[str, Any] = {
    "temperature": 0.5,
    "max_tokens": 7,
    "top_p": 0.9,
    "seed": 3,
    "n": 1,
    "stop": ["x"],
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {5: 1},
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "ignore_eos": True,
    "min_tokens": 1,
    "stop_token_ids": [9],
}


class Capture(httpx.BaseTransport):
    """Keeps request bodies, and answers nothing."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(request.content))
        return httpx.Response(400, json={"error": {"message": "no", "type": "t", "code": "c"}})


@pytest.mark.parametrize("how", ["fields", "bound"])
def test_every_parameter_is_one_of_the_protocols(how: str) -> None:
    capture = Capture()
    with httpx.Client(transport=capture) as http_client:
        given = EVERYTHING if how == "fields" else {}
        llm = ChatMacaw(model="m", http_client=http_client, max_retries=0, **given)
        runnable = llm if how == "fields" else llm.bind(**EVERYTHING)
        with pytest.raises(Exception, match="no"):
            runnable.invoke("hi")
        with pytest.raises(Exception, match="no"):
            next(runnable.stream("hi"))
    plain, streamed = [ChatCompletionRequest.model_validate_json(json.dumps(body)) for body in capture.bodies]
    expected = {**EVERYTHING, "logit_bias": {"5": 1}, "model": "m"}
    sent = plain.model_dump(exclude_unset=True, exclude={"messages", "stream"})
    assert sent == expected
    assert streamed.stream
    assert streamed.stream_options is not None
    assert streamed.stream_options.include_usage


def test_max_completion_tokens_is_an_alias() -> None:
    assert ChatMacaw(model="m", max_completion_tokens=5).max_tokens == 5


@pytest.mark.parametrize("wrong", [{"use_responses_api": True}, {"output_version": "responses/v1"}])
def test_responses_api_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="speaks /v1/chat/completions"):
        ChatMacaw(model="m", **wrong)


def test_server_and_key_come_from_macaws_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-server")
    monkeypatch.setenv("OPENAI_API_BASE", "http://openai.invalid/v1")
    monkeypatch.delenv("MACAW_API_KEY", raising=False)
    monkeypatch.delenv("MACAW_BASE_URL", raising=False)
    llm = ChatMacaw(model="m")
    assert llm.openai_api_base == "http://127.0.0.1:8000/v1"
    assert llm.root_client.api_key == "none"
    monkeypatch.setenv("MACAW_API_KEY", "mine")
    monkeypatch.setenv("MACAW_BASE_URL", "http://macaw.invalid/v1")
    llm = ChatMacaw(model="m")
    assert llm.openai_api_base == "http://macaw.invalid/v1"
    assert llm.root_client.api_key == "mine"


def test_tracing_parameters() -> None:
    llm = ChatMacaw(model="m", temperature=0.5, max_tokens=3)
    assert llm._llm_type == "macaw-chat"
    params = llm._get_ls_params()
    assert (params["ls_provider"], params["ls_model_name"]) == ("macaw", "m")
    assert (params["ls_temperature"], params["ls_max_tokens"]) == (0.5, 3)


def test_key_is_not_written() -> None:
    llm = ChatMacaw(model="m", api_key="sk-secret")
    assert "sk-secret" not in dumps(llm)
    assert "MACAW_API_KEY" in dumps(llm)
    assert "sk-secret" not in repr(llm)


def test_usage_has_cached_tokens(llm: ChatMacaw) -> None:
    message = llm.invoke("four")
    assert message.usage_metadata is not None
    assert message.usage_metadata["input_tokens"] == 4
    assert message.usage_metadata["input_token_details"] == {"cache_read": 2}
    chunks = list(llm.stream("four"))
    assert [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata] == [message.usage_metadata]


@pytest.mark.parametrize("way", ["invoke", "stream"])
def test_replayed_message_is_the_native_one(way: str, llm: ChatMacaw, recorder: Recorder) -> None:
    def messages(runnable: Any) -> list[AIMessage]:
        answers = [runnable.invoke("hi")] if way == "invoke" else list(runnable.stream("hi"))
        return [
            answer.model_copy(update={"id": None, "response_metadata": {**answer.response_metadata, "id": None}})
            for answer in answers
        ]

    assert messages(compile(llm)) == messages(llm)
    assert recorder.requests == {"program": 1, "chat": 1}


def test_several_prompts_run_at_the_same_time(server_url: str, recorder: Recorder) -> None:
    """Each request waits for the others: one after the other they would wait for ever."""
    barrier = threading.Barrier(3, timeout=30)

    class Meet(httpx.BaseTransport):
        def __init__(self) -> None:
            self._wire = httpx.HTTPTransport()

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            barrier.wait()
            return self._wire.handle_request(request)

        def close(self) -> None:
            self._wire.close()

    with httpx.Client(transport=Meet()) as http_client:
        llm = ChatMacaw(model="m", base_url=server_url, http_client=http_client)
        result = llm.generate([[HumanMessage(f"prompt {i}")] for i in range(3)])
    assert len(result.generations) == len(result.run or []) == 3
    assert result.llm_output is not None
    assert result.llm_output["token_usage"]["prompt_tokens"] == 3 * len("prompt 0")
    assert ["prompt" in prompt for prompt in recorder.prompts] == [True] * 3


def test_event_loops_come_and_go(llm: ChatMacaw, recorder: Recorder) -> None:
    """Connections of a loop end with it, and the next loop has its own."""
    for _ in range(2):
        assert asyncio.run(llm.ainvoke("hi")).content
        assert asyncio.run(compile(llm).ainvoke("hi")).content
    assert recorder.requests == {"chat": 2, "program": 2}
    transport = shared_async_client()._transport
    assert not [loop for loop in transport._pools if loop.is_closed()]  # type: ignore[attr-defined]


def test_http_client_is_used_for_requests_and_programs(server_url: str, recorder: Recorder) -> None:
    seen: list[str] = []
    hooks = {"request": [lambda request: seen.append(request.url.path)]}
    with httpx.Client(event_hooks=hooks) as http_client:
        llm = ChatMacaw(model="m", base_url=server_url, http_client=http_client)
        llm.invoke("hi")
        compile(llm).invoke("hi")
        assert not http_client.is_closed
    assert seen == ["/v1/chat/completions", "/v1/programs"]


def test_copies_answer_from_plans_too(llm: ChatMacaw, recorder: Recorder) -> None:
    for copy in (llm.model_copy(), pickle.loads(pickle.dumps(llm)), ChatMacaw(**llm.__dict__)):
        recorder.clear()
        assert compile(copy).invoke("hi").content == llm.invoke("hi").content
        assert recorder.requests == {"program": 1, "chat": 1}
