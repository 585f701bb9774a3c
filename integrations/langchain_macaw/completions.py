"""`openai`'s ``chat.completions``, answering from the current plan where that holds the request.

This is the place where `BaseChatOpenAI` sends a request, whichever way it was called. What comes back has the
types of `openai`'s own client, so conversion, usage, errors and callbacks are LangChain's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from openai.types.chat import ChatCompletion

from langchain_macaw.plan import CURRENT_PLAN
from macaw.errors import error_from_wire
from macaw.protocol import AnswerFacts, CallCompleted, CallDelta, CallFailed, ErrorBody
from macaw.replay import ABANDONED, CallEvent, Replay

_RETRIED_STATUSES = (408, 409, 429)  # by openai's client, and everything from 500


@dataclass(frozen=True, slots=True)
class _RawAnswer:
    """An answer in the form of `openai`'s raw responses, without a response."""

    answer: Any

    def parse(self) -> Any:
        """The answer."""
        return self.answer


@dataclass(frozen=True, slots=True)
class _WithRawResponse:
    create: Callable[..., Any]


class ReplayingCompletions:
    """The synchronous resource.

    Args:
        client: Whose ``chat.completions`` takes the requests that are not planned.
    """

    def __init__(self, client: openai.OpenAI) -> None:
        self._client = client
        self.with_raw_response = _WithRawResponse(self._create_raw)

    def create(self, **payload: Any) -> Any:
        """A completion; for ``stream=True`` a context manager whose value iterates over chunks."""
        answer = self._answer(payload)
        return self._client.chat.completions.create(**payload) if answer is None else answer

    def _create_raw(self, **payload: Any) -> Any:
        answer = self._answer(payload)
        if answer is None:
            return self._client.chat.completions.with_raw_response.create(**payload)
        return _RawAnswer(answer)

    def _answer(self, payload: dict[str, Any]) -> Any:
        replay = _planned(payload)
        first = replay.next().result() if replay else None
        if replay is None or first is None or _is_retried(first, self._client):
            return None
        _raise_failure(first, self._client)
        return closing(self._chunks(replay, first, payload)) if payload.get("stream") else _completion(first)

    def _chunks(self, replay: Replay, event: CallEvent | None, payload: dict[str, Any]) -> Iterator[dict[str, Any]]:
        while isinstance(event, CallDelta):
            yield from _chunk(event)
            event = replay.next().result()
        _end_quietly(event)
        _raise_failure(event, self._client)
        yield from _usage_chunk(event, payload)


class AsyncReplayingCompletions:
    """The asynchronous resource; see `ReplayingCompletions`."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self._client = client
        self.with_raw_response = _WithRawResponse(self._create_raw)

    async def create(self, **payload: Any) -> Any:
        """As `ReplayingCompletions.create`, with an asynchronous context manager for ``stream=True``."""
        answer = await self._answer(payload)
        return await self._client.chat.completions.create(**payload) if answer is None else answer

    async def _create_raw(self, **payload: Any) -> Any:
        answer = await self._answer(payload)
        if answer is None:
            return await self._client.chat.completions.with_raw_response.create(**payload)
        return _RawAnswer(answer)

    async def _answer(self, payload: dict[str, Any]) -> Any:
        replay = _planned(payload)
        first = await asyncio.wrap_future(replay.next()) if replay else None
        if replay is None or first is None or _is_retried(first, self._client):
            return None
        _raise_failure(first, self._client)
        return aclosing(self._chunks(replay, first, payload)) if payload.get("stream") else _completion(first)

    async def _chunks(
        self, replay: Replay, event: CallEvent | None, payload: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        while isinstance(event, CallDelta):
            for chunk in _chunk(event):
                yield chunk
            event = await asyncio.wrap_future(replay.next())
        _end_quietly(event)
        _raise_failure(event, self._client)
        for chunk in _usage_chunk(event, payload):
            yield chunk


def _planned(payload: Mapping[str, Any]) -> Replay | None:
    plan = CURRENT_PLAN.get()
    replay = plan.take(_without_hints(payload)) if plan else None
    if replay and not payload.get("stream"):
        replay.skip_deltas()
    return replay


def _without_hints(payload: Mapping[str, Any]) -> Mapping[str, Any]:
    """A plan knows what its calls belong to."""
    body = payload.get("extra_body")
    if not body or "macaw" not in body:
        return payload
    return {**payload, "extra_body": {name: value for name, value in body.items() if name != "macaw"}}


def _completion(event: CallEvent) -> ChatCompletion:
    assert isinstance(event, CallCompleted), event
    return ChatCompletion.construct(**event.completion, macaw=_facts(event))


def _facts(event: CallCompleted) -> dict[str, Any]:
    """What the server adds to an ordinary answer."""
    plan = CURRENT_PLAN.get()
    facts = AnswerFacts(program_id=(plan and plan.program_id) or "", timings=event.timings)
    return facts.model_dump(exclude_defaults=True)


def _chunk(event: CallDelta) -> Iterator[dict[str, Any]]:
    if event.chunk["choices"]:  # usage comes where it was asked for: see _usage_chunk
        yield event.chunk


def _usage_chunk(event: CallEvent | None, payload: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The last chunk that a stream with ``include_usage`` has."""
    assert isinstance(event, CallCompleted), event
    if (payload.get("stream_options") or {}).get("include_usage"):
        completion = event.completion
        yield {
            "id": completion["id"],
            "object": "chat.completion.chunk",
            "created": completion["created"],
            "model": completion["model"],
            "choices": [],
            "usage": completion["usage"],
            "macaw": _facts(event),
        }


def _end_quietly(event: CallEvent | None) -> None:
    """LangChain reads what is left of a stream that is being closed: there, nobody can catch an error."""
    if event is ABANDONED:
        raise GeneratorExit


def _is_retried(event: CallEvent, client: openai.OpenAI | openai.AsyncOpenAI) -> bool:
    """Whether `openai`'s client would try again after this; the ordinary request is then the second try."""
    if not isinstance(event, CallFailed) or not client.max_retries:
        return False
    status = _status(event.error)
    return status in _RETRIED_STATUSES or status >= 500


def _raise_failure(event: CallEvent | None, client: openai.OpenAI | openai.AsyncOpenAI) -> None:
    """Raise what `openai`'s client raises natively, if the call has no answer or only half of one."""
    request: Any = httpx.Request("POST", f"{client.base_url}chat/completions")
    if event is None:
        message = "The connection broke before the answer was complete."
        raise openai.APIConnectionError(message=message, request=request)
    if isinstance(event, CallFailed):
        body = {"error": event.error.model_dump()}
        response: Any = httpx.Response(_status(event.error), json=body, request=request)
        raise client._make_status_error_from_response(response)


def _status(error: ErrorBody) -> int:
    return error_from_wire(error.model_dump()).status
