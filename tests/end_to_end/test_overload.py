"""One tenant sends far more than the server can do: it is refused, and another one's programs are done all the same."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest

from macaw import AsyncMacawClient, ProgramBuilder
from macaw_server.serve import LocalServer
from noise import NOISE

LIMIT = 20
OPTIONS = {"temperature": 0, "ignore_eos": True}


async def flood(url: str, number: int, over: asyncio.Event) -> Counter[int]:
    """Ten times what the server takes at once, sent again and again whatever the answer says; statuses by number."""
    statuses: Counter[int] = Counter()
    body = {"prompt": "more and more and more", "max_tokens": 400, **OPTIONS}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits, headers={"authorization": "Bearer greedy"}) as client:

        async def send() -> None:
            while not over.is_set():
                response = await client.post(url + "/v1/completions", json=body)
                statuses[response.status_code] += 1
                if response.status_code == 429:
                    assert 1 <= int(response.headers["retry-after"]) <= 600
                    assert response.json()["error"]["code"] == "overloaded"
                else:
                    assert response.json()["usage"]["completion_tokens"] == 400

        await asyncio.gather(*(send() for _ in range(number)))
    return statuses


def chain() -> ProgramBuilder:
    """Three calls, each with the answer of the one before."""
    builder = ProgramBuilder()
    last = builder.chat("Begin.", name="call-0", max_tokens=20, **OPTIONS)
    for i in (1, 2):
        last = builder.chat("Go on: ", last, name=f"call-{i}", max_tokens=20, **OPTIONS)
    builder.target(last)
    return builder


@pytest.mark.slow
async def test_a_flood_of_one_tenant_is_refused_and_the_programs_of_another_end() -> None:
    config = {**NOISE, "dtype": "float32", "max_model_len": 1024, "max_live_calls": LIMIT}
    with LocalServer(**config, api_key=("greedy", "modest")) as server:
        over = asyncio.Event()
        flooding = asyncio.create_task(flood(server.url, 10 * LIMIT, over))
        try:
            async with AsyncMacawClient(server.url, "modest", max_retries=0) as client:
                results = [await client.run_program(chain().build()) for _ in range(5)]
        finally:
            over.set()
        statuses = await flooding
        assert server.service is not None
        assert server.service.num_live_calls == 0
    assert all(result.status == "completed" for result in results)
    assert statuses.keys() == {200, 429}
    assert statuses[429] > 10 * LIMIT
