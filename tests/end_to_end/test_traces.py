"""What ran on a real server is recorded, simulated, and runs again: the same tokens, the same sharing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from conftest import TENANTS
from macaw import AsyncMacawClient, CancelledError, ProgramBuilder
from macaw.builder import Ref
from macaw_server.bench.workload.clients import Way
from macaw_server.scheduler import StepTimeModel
from macaw_server.serve import LocalServer
from macaw_server.simulate.virtual import Simulation, SimulationConfig
from macaw_server.traces.lines import Totals
from macaw_server.traces.record import RecordOptions, record
from macaw_server.traces.replay import ReplayOptions, replay
from macaw_server.workloads import ProgramSpec, read_trace
from noise import NOISE

OPTIONS: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
PAGE = 16


def shared(words: int) -> str:
    """Text that nobody has sent before."""
    return f"{uuid4()} " + "All that follows is about one and the same thing. " * (words // 10)


async def map_reduce(client: AsyncMacawClient, system: str) -> None:
    builder = ProgramBuilder()
    maps = [builder.chat(f"Chunk {i}: {uuid4()}", system=system, max_tokens=6, **OPTIONS) for i in range(3)]
    reduced = builder.chat("Combine: ", builder.join(maps, separator="\n"), system=system, max_tokens=9, **OPTIONS)
    builder.target(reduced, objective="throughput", deadline_ms=60_000)
    await client.run_program(builder.build(metadata={"chain": "Summaries"}))


async def growing(client: AsyncMacawClient, system: str) -> None:
    """Three turns; between them the client works."""
    builder = ProgramBuilder()
    last: Ref = builder.chat("Begin", system=system, name="turn0", max_tokens=8, **OPTIONS)
    stream = await client.stream_program(builder.build(open=True))
    turn = 0
    async for event in stream:
        if event.type == "call.completed" and turn < 2:
            turn += 1
            await asyncio.sleep(0.03)  # what the trace is to show, not what the test waits for
            last = builder.chat(f"Tool {turn}", last, system=system, name=f"turn{turn}", max_tokens=8, **OPTIONS)
            if turn == 2:
                builder.target(last)
            await client.grow(stream.program_id, builder.growth(close=turn == 2))
    await stream.result()


async def cancelled(client: AsyncMacawClient) -> None:
    builder = ProgramBuilder()
    first = builder.chat(shared(50), max_tokens=1500, **OPTIONS)
    builder.target(builder.chat("Never: ", first, max_tokens=5, **OPTIONS))
    stream = await client.stream_program(builder.build())
    async for event in stream:
        if event.type == "call.delta":
            await client.cancel(stream.program_id)
    with pytest.raises(CancelledError):
        await stream.result()


async def requests(url: str, system: str, app: str) -> None:
    """Two steps of an application by hints, and one request of nobody's."""
    async with httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {TENANTS[0]}"}) as http:
        messages = [{"role": "system", "content": system}]
        for i in range(2):
            messages = [*messages, {"role": "user", "content": f"Question {i}"}]
            body = {"messages": messages, "max_tokens": 7, "macaw": {"app": app}, **OPTIONS}
            assert (await http.post("/v1/chat/completions", json=body)).is_success
        body = {"prompt": shared(40), "max_tokens": 4, "n": 2, **OPTIONS}
        assert (await http.post("/v1/completions", json=body)).is_success


async def load(url: str) -> None:
    system, other = shared(200), shared(100)
    async with AsyncMacawClient(url, TENANTS[0]) as client, AsyncMacawClient(url, TENANTS[1]) as neighbour:
        await map_reduce(client, system)
        await map_reduce(neighbour, system)
        await map_reduce(client, system)
        await growing(client, other)
        await cancelled(client)
    await requests(url, other, f"agent-{uuid4()}")


@pytest.fixture(scope="module")
def recorded(local_server: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Totals]:
    out = tmp_path_factory.mktemp("traces") / "trace.jsonl"

    def stop() -> Awaitable[object]:
        return load(local_server.url)

    return out, asyncio.run(record(RecordOptions(local_server.url, TENANTS, out), stop, lambda _: None))


def tokens(specs: list[ProgramSpec]) -> tuple[int, int]:
    prompts = sum(sum(spec.prompt_lens().values()) for spec in specs)
    return prompts, sum(call.output_len for spec in specs for call in spec.calls)


def test_the_trace_has_what_ran(recorded: tuple[Path, Totals]) -> None:
    path, totals = recorded
    specs = read_trace(path)
    assert [spec.app for spec in specs] == [*["Summaries"] * 3, "programs", "programs", "agent", "requests"]
    assert [spec.tenant for spec in specs] == ["t0", "t1", *["t0"] * 5]
    assert (specs[0].objective, specs[0].deadline_s) == ("throughput", 60)
    first, *_, growth, cut, agent, alone = specs
    assert [call.deps for call in first.calls] == [(), (), (), ("chat-0", "chat-1", "chat-2")]
    assert [call.gap_s > 0.02 for call in growth.calls] == [False, True, True]
    assert [len(call.deps) for call in growth.calls] == [0, 1, 1]
    assert [call.deps for call in agent.calls] == [(), ("call0",)]
    assert agent.calls[1].gap_s > 0
    assert [call.output_len for call in alone.calls] == [4, 4]
    assert [call.id for call in cut.calls] == ["chat-0"]
    assert 1 <= cut.calls[0].output_len < 1500
    assert (totals.num_programs, totals.num_calls, totals.num_cut, totals.num_lost) == (7, 19, 1, 0)
    # The second choice has the prompt of the first.
    prompt_tokens, output_tokens = tokens(specs)
    assert prompt_tokens == totals.prompt_tokens + alone.prompt_lens()["call0"]
    assert output_tokens == totals.output_tokens
    text = path.read_text()
    assert not any(word in text for word in ("follows", "Chunk", "tenant-a", "prog-"))


@pytest.mark.parametrize("way", ["programs", "requests"])
def test_it_runs_again(local_server: LocalServer, recorded: tuple[Path, Totals], way: Way) -> None:
    path, totals = recorded
    result = replay(
        ReplayOptions(path, local_server.url, TENANTS, way, speed=2.0, model=NOISE["model"], seed=uuid4().int % 2**31)
    )
    assert not result.failures
    prompt_tokens, cached_tokens, output_tokens = result.seen
    assert (prompt_tokens, output_tokens) == result.asked == tokens(read_trace(path))
    second_choice = prompt_tokens - totals.prompt_tokens
    assert abs(cached_tokens - totals.cached_tokens - second_choice) <= PAGE * totals.num_calls
    assert cached_tokens > prompt_tokens / 3
    [summaries] = result.report.summaries.values()
    assert {s.app: s.num_programs for s in summaries} == {"Summaries": 3, "programs": 2, "agent": 1, "requests": 1}


def test_it_is_simulated(recorded: tuple[Path, Totals]) -> None:
    path, totals = recorded
    specs = read_trace(path)
    result = Simulation(SimulationConfig(page_size=PAGE), StepTimeModel(), specs).run()
    calls = [call for program in result.programs for call in program.calls.values()]
    assert (sum(call.prompt_len for call in calls), sum(call.output_len for call in calls)) == tokens(specs)
    second_choice = tokens(specs)[0] - totals.prompt_tokens
    cached_tokens = sum(call.cached_tokens for call in calls)
    assert abs(cached_tokens - totals.cached_tokens - second_choice) <= PAGE * totals.num_calls
