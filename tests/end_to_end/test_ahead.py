"""Prefill ahead and pipelining against a real engine: the same tokens, more of them cached, nothing left behind."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import pytest

from macaw import MacawClient, ProgramBuilder
from macaw.protocol import CallDelta, ProgramRequest, ProgramState
from macaw_server.engine.types import EngineStats
from macaw_server.serve import LocalServer
from noise import NOISE

TEXT = "A macaw serves applications, and the constant text of a prompt is there before its variables are. "
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, LocalServer]]:
    """One without, and one in which even busy steps prefill ahead; few pages, so that they evict and preempt."""
    common = {**NOISE, "dtype": "float32", "max_model_len": 1024, "kv_memory": "4MiB"}
    with (
        LocalServer(**common, prefill_ahead=False) as off,
        LocalServer(**common, ahead_rows=64) as on,
    ):
        yield {"off": off, "on": on}


def stats(server: LocalServer) -> EngineStats:
    assert server.service is not None
    assert server.loop is not None
    return asyncio.run_coroutine_threadsafe(server.service.models.find(None).engine.stats(), server.loop).result()


def chain(rng: random.Random, hops: int = 4) -> ProgramRequest:
    b = ProgramBuilder()
    last = b.chat("Begin:", name="hop-0", max_tokens=48, **GREEDY)
    for i in range(1, hops):
        text = TEXT * rng.randint(1, 3) + str(rng.random())
        parts = (text, last, " END") if rng.random() < 0.5 else ("So far:", last, text)
        last = b.chat(*parts, name=f"hop-{i}", max_tokens=rng.randint(8, 70), **GREEDY)
    b.target(last)
    return b.build()


def refine(rng: random.Random) -> ProgramRequest:
    b = ProgramBuilder()
    draft = b.chat(TEXT + str(rng.random()), name="draft", max_tokens=80, **GREEDY)
    trimmed = b.transform(rng.choice(["strip", "html_escape"]), draft)
    critic = b.chat(TEXT, trimmed, name="critic", system=TEXT, max_tokens=40, **GREEDY)
    b.target(b.chat("Draft:", draft, "Critique:", critic, name="final", max_tokens=20, **GREEDY))
    return b.build()


def map_reduce(rng: random.Random) -> ProgramRequest:
    b = ProgramBuilder()
    maps = [
        b.chat(f"{i} {rng.random()} {TEXT}", name=f"map-{i}", max_tokens=rng.randint(8, 40), **GREEDY) for i in range(5)
    ]
    joined = b.join(maps, separator="\n- ", strip=rng.random() < 0.5)
    b.target(b.complete(TEXT, joined, "\nAll:", name="reduce", max_tokens=20, **GREEDY))
    return b.build()


def corpus() -> list[ProgramRequest]:
    rng = random.Random(20261124)
    return [make(rng) for make in (chain, refine, map_reduce) * 4]


def test_answers_are_the_same_token_for_token(servers: dict[str, LocalServer]) -> None:
    states: dict[str, list[ProgramState]] = {}
    for name, server in servers.items():
        with MacawClient(server.url) as client:
            states[name] = [client.run_program(request) for request in corpus()]
    for off, on in zip(states["off"], states["on"], strict=True):
        assert [call.completion and call.completion["choices"] for call in on.calls] == [
            call.completion and call.completion["choices"] for call in off.calls
        ]
        assert on.totals.prompt_tokens == off.totals.prompt_tokens
    cached = {name: sum(state.totals.cached_tokens for state in states[name]) for name in states}
    used = sum(call.timings.prefilled_ahead_tokens for state in states["on"] for call in state.calls)
    assert cached["on"] > cached["off"]
    assert 0 < used <= stats(servers["on"]).ahead_tokens
    assert stats(servers["off"]).ahead_tokens == 0


def test_at_once_and_cancelled_midway(servers: dict[str, LocalServer]) -> None:
    rng = random.Random(7)
    with MacawClient(servers["off"].url) as client:
        requests = [refine(rng), map_reduce(rng), chain(rng)]
        expected = [client.run_program(request).variables for request in requests]
    with MacawClient(servers["on"].url) as client:
        streams = [client.stream_program(request) for request in requests]
        doomed = [client.stream_program(chain(rng)) for _ in range(4)]
        for i, stream in enumerate(doomed):
            for seen, event in enumerate(stream):
                if isinstance(event, CallDelta) and seen > 12 * i:
                    break
            stream.close()
        assert [stream.result() for stream in streams] == [
            {target.variable: values[target.variable] for target in request.targets}
            for request, values in zip(requests, expected, strict=True)
        ]
        left = stats(servers["on"])
        service = servers["on"].service
        assert service is not None
        while service.num_live_calls:
            client.health()
        left = stats(servers["on"])
    assert (left.running, left.waiting, left.pages_used) == (0, 0, 0)
    assert service._surroundings.ahead.num_live == 0


def test_a_prompt_is_there_before_the_client_answers(servers: dict[str, LocalServer]) -> None:
    b = ProgramBuilder()
    found = b.external("found")
    b.target(b.chat("Unlike all others. " + TEXT * 6, found, name="answer", max_tokens=4, **GREEDY))
    with MacawClient(servers["on"].url) as client:
        before = stats(servers["on"]).ahead_tokens
        stream = client.stream_program(b.build())
        while stats(servers["on"]).ahead_tokens - before < 48:
            time.sleep(0)
        client.set_variable(stream.program_id, "found", "nothing")
        stream.result()
        (call,) = client.get_program(stream.program_id).calls
    assert call.timings.prefilled_ahead_tokens >= 48
    assert call.timings.ahead_ms is not None
    assert call.timings.ready_ms is not None
    assert call.timings.ahead_ms < call.timings.ready_ms
