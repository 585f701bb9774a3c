"""Prefix caching and placement off on whole servers: the same answers, other work, and nothing left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from macaw import MacawClient, ProgramBuilder
from macaw.protocol import ProgramRequest, ProgramState
from macaw_server.engine.group import EngineGroup
from macaw_server.engine.types import Engine, EngineStats
from macaw_server.serve import LocalServer
from noise import NOISE

RULES = "These are the rules that all calls of this program begin with, so that they are worth keeping. " * 6
COMMON: dict[str, Any] = {**NOISE, "dtype": "float32", "max_model_len": 2048, "kv_memory": "16MiB"}
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


def review(num_parts: int) -> ProgramRequest:
    """Calls behind one text at once, long enough to work ahead beside them, and one behind it that reads them."""
    b = ProgramBuilder()
    parts = [
        b.chat(f"Read part {i}.", name=f"part-{i}", system=RULES, max_tokens=160, **GREEDY) for i in range(num_parts)
    ]
    b.target(b.chat("All of this:", *parts, name="whole", system=RULES, max_tokens=20, **GREEDY))
    return b.build()


def run(server: LocalServer, num_parts: int, times: int = 1) -> tuple[list[ProgramState], list[EngineStats]]:
    """The same program several times, one after the other; then what each engine has done."""
    with MacawClient(server.url) as client:
        states = [client.run_program(review(num_parts)) for _ in range(times)]
    assert server.service is not None
    assert server.loop is not None
    engine = server.service.models.find(None).engine
    return states, asyncio.run_coroutine_threadsafe(_stats(engine), server.loop).result()


async def _stats(engine: Engine) -> list[EngineStats]:
    return await engine.member_stats() if isinstance(engine, EngineGroup) else [await engine.stats()]


def cached_tokens(state: ProgramState) -> list[int]:
    return [
        call.completion["usage"]["prompt_tokens_details"]["cached_tokens"] for call in state.calls if call.completion
    ]


def test_without_prefix_caching_every_prompt_is_computed() -> None:
    with LocalServer(**COMMON, ahead_rows=64) as on:
        (state,), (with_cache,) = run(on, 4)
    with LocalServer(**COMMON, ahead_rows=64, prefix_caching=False) as off:
        (plain,), (stats,) = run(off, 4)
    assert plain.variables == state.variables
    assert sum(tokens > 100 for tokens in cached_tokens(state)) >= 4
    assert cached_tokens(plain) == [0] * 5
    assert (with_cache.ahead_tokens > 0, stats.ahead_tokens) == (True, 0)
    assert with_cache.computed_tokens < stats.computed_tokens == stats.prompt_tokens
    assert (stats.pages_used, stats.pages_cached) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "num_used"), [("affinity", 1), ("least-loaded", 2)])
def test_a_call_goes_where_its_prefix_is_or_where_fewest_calls_are(placement: str, num_used: int) -> None:
    with LocalServer(**COMMON, placement=placement, engines=2, threads=2) as server:
        states, each = run(server, 0, times=4)
    assert len({state.variables["whole"] for state in states}) == 1
    assert sum(stats.output_tokens > 0 for stats in each) == num_used
    assert sum(tokens > 100 for state in states for tokens in cached_tokens(state)) == 4 - num_used
    assert sum(stats.pages_used for stats in each) == 0
