"""One side of a comparison: what counts, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from macaw_server.bench.client import Side
from macaw_server.bench.errors import BenchError


class Peer:
    """An OpenAI-compatible server that streams `x` for each token, and errs as it is told to."""

    def __init__(self, extra_prompt: int = 0, missing: int = 0, text: str = "x", failure: str = "") -> None:
        self.extra_prompt, self.missing, self.text, self.failure = extra_prompt, missing, text, failure
        self.bodies: list[dict[str, object]] = []
        routes = [Route("/v1/models", self.models), Route("/v1/completions", self.complete, methods=["POST"])]
        self.side = Side("peer", "http://peer/v1/", "key", transport=httpx.ASGITransport(Starlette(routes=routes)))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "noise"}]}, headers={"server": "scripted"})

    async def complete(self, request: Request) -> Response:
        assert request.headers["authorization"] == "Bearer key"
        body = await request.json()
        self.bodies.append(body)
        if self.failure == "status":
            return JSONResponse({"error": {"message": "out of slots"}}, 503)
        return StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def stream(self, body: dict) -> AsyncIterator[str]:
        num_output = body["max_tokens"] - self.missing
        for _ in range(num_output):
            yield event({"choices": [{"text": self.text}]})
            if self.failure == "stream":
                yield event({"error": {"message": "engine gone"}})
        usage = {
            "prompt_tokens": len(body["prompt"]) + self.extra_prompt,
            "completion_tokens": num_output,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        if self.failure != "usage":
            yield event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def event(content: dict[str, object]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def test_a_burst_is_timed_and_asks_for_equal_work() -> None:
    peer = Peer()
    async with peer.side as side:
        burst = await side.burst([[5, 6, 7, 8], [5, 6, 9, 10]], 6)
    assert (side.model, side.software, side.url) == ("noise", "scripted", "http://peer")
    assert burst.output_tokens == 12
    assert [(len(a.gaps_s), a.cached_tokens) for a in burst.answers] == [(5, 3), (5, 3)]
    assert all(0 < a.first_chunk_s <= a.first_chunk_s + sum(a.gaps_s) <= a.seconds for a in burst.answers)
    assert burst.tokens_per_s == 12 / max(a.seconds for a in burst.answers)
    assert [body["prompt"] for body in peer.bodies] == [[5, 6, 7, 8], [5, 6, 9, 10]]
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in peer.bodies)


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (Peer(extra_prompt=1), "peer reports 5 prompt tokens where 4 were asked for"),
        (Peer(missing=2), "peer reports 4 completion tokens where 6 were asked for"),
        (Peer(failure="usage"), "peer reports None prompt tokens"),
        (Peer(failure="status"), "peer answered 503: .*out of slots"),
        (Peer(failure="stream"), "peer failed in mid-stream: .*engine gone"),
        (Peer(text=""), r"peer streamed no text. Choose other token ids for the prompts \(--ids\)"),
    ],
)
async def test_other_work_and_failures_are_refused(peer: Peer, message: str) -> None:
    async with peer.side as side:
        with pytest.raises(BenchError, match=message):
            await side.burst([[5, 6, 7, 8]] * 2, 6)


async def test_nobody_there(unused_tcp_port: int) -> None:
    with pytest.raises(BenchError, match=f"peer: http://127.0.0.1:{unused_tcp_port}/v1/models does not list a model"):
        async with Side("peer", f"http://127.0.0.1:{unused_tcp_port}"):
            pass
