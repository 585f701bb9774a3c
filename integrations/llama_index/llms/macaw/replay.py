"""Answering requests from plans, in the place where they would leave the process: below `openai`'s client.

All above is untouched: `openai`'s client parses what comes from a plan, raises its errors and repeats what it
would repeat, and LlamaIndex's callbacks, spans and events see what they would see.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from llama_index.llms.macaw.plan import request_key
from llama_index.llms.macaw.running import CURRENT_RUN
from macaw.errors import error_from_wire
from macaw.protocol import CallCompleted, CallDelta, CallFailed
from macaw.replay import CallEvent, Replay

_ENDPOINTS = ("/chat/completions", "/completions")
_BROKEN = {"message": "The connection broke before the answer was complete.", "type": "server_error", "param": None}


def replaying(client: httpx.Client) -> httpx.Client:
    """A client that answers from the current run's plans; what they do not hold goes through `client`."""
    return httpx.Client(transport=_Transport(client), trust_env=False, **_defaults(client))


def areplaying(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """The asynchronous `replaying`."""
    return httpx.AsyncClient(transport=_AsyncTransport(client), trust_env=False, **_defaults(client))


class _Transport(httpx.BaseTransport):
    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        replay, body = _planned(request)
        event = replay.next().result() if replay else None
        if replay is None or event is None:
            return self._client.send(request, stream=True)
        return _answer(replay, event, body, request)


class _AsyncTransport(httpx.AsyncBaseTransport):
    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        replay, body = _planned(request)
        event = await asyncio.wrap_future(replay.next()) if replay else None
        if replay is None or event is None:
            return await self._client.send(request, stream=True)
        return _answer(replay, event, body, request)


class _Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """The body of a streamed answer: server-sent events, as the server would write them."""

    def __init__(self, replay: Replay, first: CallEvent, include_usage: bool) -> None:
        self._replay = replay
        self._first = first
        self._include_usage = include_usage

    def __iter__(self) -> Iterator[bytes]:
        event: CallEvent | None = self._first
        while isinstance(event, CallDelta):
            yield _delta(event)
            event = self._replay.next().result()
        yield self._end(event)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        event: CallEvent | None = self._first
        while isinstance(event, CallDelta):
            yield _delta(event)
            event = await asyncio.wrap_future(self._replay.next())
        yield self._end(event)

    def _end(self, event: CallEvent | None) -> bytes:
        if not isinstance(event, CallCompleted):
            return _line({"error": event.error.model_dump() if isinstance(event, CallFailed) else _BROKEN})
        end = b"data: [DONE]\n\n"
        if not self._include_usage:
            return end
        completion = event.completion
        kind = "chat.completion.chunk" if "message" in completion["choices"][0] else "text_completion"
        head = {name: completion[name] for name in ("id", "created", "model")}
        return _line({**head, "object": kind, "choices": [], "usage": completion["usage"]}) + end


def _defaults(client: httpx.Client | httpx.AsyncClient) -> dict[str, Any]:
    return {name: getattr(client, name) for name in ("headers", "params", "cookies", "timeout")}


def _planned(request: httpx.Request) -> tuple[Replay | None, dict[str, Any]]:
    run = CURRENT_RUN.get()
    if run is None or request.method != "POST" or not request.url.path.endswith(_ENDPOINTS):
        return None, {}
    body = json.loads(request.content)
    replay = run.take(request_key(body))
    if replay and not body.get("stream"):
        replay.skip_deltas()
    return replay, body


def _answer(replay: Replay, event: CallEvent, body: dict[str, Any], request: httpx.Request) -> httpx.Response:
    match event:
        case CallFailed():
            error = event.error.model_dump()
            return httpx.Response(error_from_wire(error).status, json={"error": error}, request=request)
        case _ if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            stream = _Chunks(replay, event, usage)
            return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=stream, request=request)
        case CallCompleted():
            return httpx.Response(200, json=event.completion, request=request)
    raise AssertionError(event)


def _delta(event: CallDelta) -> bytes:
    """Usage comes where it was asked for: see `_Chunks._end`."""
    return _line(event.chunk) if event.chunk["choices"] else b""


def _line(data: Any) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"
