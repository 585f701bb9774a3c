"""Several engines as one: `kill -9` of one of two, its return, sums."""

from __future__ import annotations

import os
import signal

from macaw_server.config import EngineConfig
from macaw_server.engine.group import EngineGroup, sum_stats
from macaw_server.engine.memory import size_pool
from macaw_server.engine.process import EngineProcess
from macaw_server.engine.types import EngineRequest, EngineStats, SamplingParams
from server.engine.test_process import CONFIG, REQUESTS, answers, expected, running

__all__ = ["expected"]
MEMBER = CONFIG.model_copy(update={"engines": 2, "threads": 2})
LONG = list(range(5, 405))


def request(name: str, prompt: list[int], max_tokens: int = 8, salt: str = "") -> EngineRequest:
    return EngineRequest(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0), salt)


async def test_kill_9_of_one_of_two_moves_its_calls_at_once(expected: dict[str, list[int]]) -> None:
    first, second = members = [EngineProcess(MEMBER) for _ in range(2)]
    group = EngineGroup(members)
    async with running(group) as collector:
        for asked in REQUESTS:
            collector.submit(asked)
        while min(len(collector.tokens(asked.request_id)) for asked in REQUESTS) < 5:
            await collector.some_output()
        loads = [(await member.stats()).running for member in members]
        assert min(loads) >= 1, "both had some"
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        while first.status == "running":
            await collector.some_output()
        assert group.status == "running"
        assert len(first._table) == 0
        assert await answers(collector) == expected
        while first.status != "running":
            await second.stats()
        stats = await group.stats()
        assert (stats.restarts, stats.running, stats.pages_used) == (1, 0, 0)
        before = (await first.stats()).steps
        for i in range(4):
            collector.submit(request(f"later{i}", [3, 4, 5 + i]))
        for i in range(4):
            assert (await collector.end(f"later{i}")).finish_reason == "length"
        assert (await first.stats()).steps > before, "it takes calls again"


async def test_a_group_aborts_and_adds_up() -> None:
    group = EngineGroup([EngineProcess(MEMBER) for _ in range(2)])
    async with running(group) as collector:
        for i in range(4):
            collector.submit(request(f"r{i}", [i + 3] * 20, 1000))
        await collector.some_output()
        group.abort([f"r{i}" for i in range(4)])
        each = await group.member_stats()
        assert [(one.running, one.waiting, one.pages_used) for one in each] == [(0, 0, 0)] * 2
        assert await group.stats() == sum_stats(each)
        assert group.info.num_pages == sum(one.pages_total for one in each)
        assert group._placed == {}


def test_sums() -> None:
    total = sum_stats([EngineStats(steps=2, forward_s=0.5), EngineStats(steps=3, forward_s=0.25, restarts=1)])
    assert total == EngineStats(steps=5, forward_s=0.75, restarts=1)


def test_memory_is_split() -> None:
    import torch

    def pages(engines: int) -> int:
        config = EngineConfig(kv_memory=2**20, engines=engines)
        return size_pool(config, page_bytes=1024, max_model_len=256, device=torch.device("cpu")).num_pages

    assert (pages(1), pages(4)) == (1024, 256)
