"""1,000 random programs with cancels, failures and broken connections: no page, call or program is left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from conftest import TENANTS
from macaw import AsyncMacawClient, MacawError, ProgramBuilder
from macaw.protocol import ProgramRequest
from macaw_server.engine.types import EngineStats
from macaw_server.serve import LocalServer

NUM_PROGRAMS, NUM_AT_ONCE = 1000, 24


def random_program(rng: random.Random) -> ProgramRequest:
    """A small graph; some of its calls are bound to fail."""
    b = ProgramBuilder()
    refs = [b.variable(value=rng.choice(["short", "a longer text that is shared " * rng.randint(1, 12)]))]
    for i in range(rng.randint(1, 5)):
        inputs = rng.sample(refs, rng.randint(1, min(2, len(refs))))
        options = {
            "temperature": rng.choice([0.0, 1.0]),
            "max_tokens": rng.randint(1, 12),
            "ignore_eos": True,
        }
        ref = b.chat(*(rng.choice(["Do this: ", "Do that: "]), *inputs), name=f"call-{i}", **options)
        if rng.random() < 0.15:
            ref = b.transform("json_pointer", ref, name=f"fails-{i}", pointer="/a")
        refs.append(ref)
    used = {part.variable for call in b.build().calls for part in call.request.parts if hasattr(part, "variable")}
    used |= {name for transform in b.build().transforms for name in transform.inputs}
    for ref in refs[1:]:
        if ref.name not in used or rng.random() < 0.2:
            b.target(ref)
    return b.build(detached=rng.random() < 0.3, max_concurrency=rng.choice([None, 1, 2]))


async def run_one(client: AsyncMacawClient, rng: random.Random) -> str:
    request, fate = random_program(rng), rng.random()
    async with await client.stream_program(request) as stream:
        if fate < 0.2:
            await client.cancel(stream.program_id)
        elif fate < 0.4:
            num_events = rng.randint(0, 12)
            async for _ in stream:
                num_events -= 1
                if num_events < 0:
                    return "left"  # the connection closes with the stream
        try:
            await stream.result()
        except MacawError as error:
            return error.code
    return "completed"


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_nothing_is_left_behind(local_server: LocalServer, engine_stats: Callable[[], EngineStats]) -> None:
    rng = random.Random(20260901)
    ends: list[str] = []
    async with AsyncMacawClient(local_server.url, TENANTS[0]) as client:
        todo = iter(range(NUM_PROGRAMS))

        async def work() -> None:
            ends.extend([await run_one(client, rng) for _ in todo])

        await asyncio.gather(*(work() for _ in range(NUM_AT_ONCE)))
        assert len(ends) == NUM_PROGRAMS
        assert {"completed", "cancelled", "upstream_failed", "left"} <= set(ends), set(ends)

        service = local_server.service
        assert service is not None
        while service.num_live_calls:  # detached programs run on
            await client.health()
    stats = await asyncio.to_thread(engine_stats)
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0), stats
    assert stats.prompt_tokens > 0
