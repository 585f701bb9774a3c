"""Several engines as one: `kill -9` of one of two, its return, calls that move, sums."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from dataclasses import replace
from typing import Any

import pytest

from collector import Collector
from macaw_server.config import EngineConfig
from macaw_server.engine import thread
from macaw_server.engine.group import EngineGroup, sum_stats
from macaw_server.engine.handle import EngineHandle
from macaw_server.engine.loop import Abort, Add, Inbound, LetGo, Outputs, Withdraw, Withdrawn
from macaw_server.engine.memory import size_pool
from macaw_server.engine.process import EngineProcess
from macaw_server.engine.thread import EngineThread, _post
from macaw_server.engine.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, SamplingParams
from server.engine.test_process import CONFIG, REQUESTS, answers, expected, running

__all__ = ["expected"]
MEMBER = CONFIG.model_copy(update={"engines": 2, "threads": 2})
LONG = list(range(5, 405))


def request(name: str, prompt: list[int], max_tokens: int = 8, salt: str = "") -> EngineRequest:
    return EngineRequest(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0), salt)


@pytest.mark.slow
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


@pytest.mark.slow
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


class ScriptedMember(EngineHandle):
    """Hears what it is told, and says what the test says."""

    def __init__(self) -> None:
        super().__init__(MEMBER)
        self.heard: list[Inbound] = []

    async def start(self) -> None:
        self._info = EngineInfo(100, 4096, 16, 1000, 4096, 10**6, "cpu", "float32", "native", frozenset(), 8)
        self._status = "running"

    async def stop(self) -> None:
        self._status = "stopped"

    def _send(self, message: Inbound) -> None:
        self.heard.append(message)

    def has(self) -> list[str]:
        """Requests that it was given and that were not taken back."""
        held: list[str] = []
        for message in self.heard:
            if isinstance(message, Add):
                assert message.request.request_id not in held, "twice"
                held.append(message.request.request_id)
            elif isinstance(message, Abort):
                held = [name for name in held if name not in message.request_ids]
            elif isinstance(message, Withdraw):
                held.remove(message.request_id)
        return held

    def say(self, *outputs: EngineOutput) -> None:
        self._on_message(Outputs(list(outputs)))


async def moved(group: EngineGroup) -> None:
    """Let what was put off to the end of this turn of the loop happen."""
    while group._to_fill:  # noqa: ASYNC110
        await asyncio.sleep(0)


class TestMoves:
    async def start(self, **options: Any) -> tuple[EngineGroup, list[ScriptedMember], Collector]:
        members = [ScriptedMember(), ScriptedMember()]
        group = EngineGroup(members, **options)
        await group.start()
        return group, members, Collector(group)

    async def test_calls_that_wait_move_when_another_engine_has_nobody_who_does(self) -> None:
        group, (busy, idle), collector = await self.start()
        for i in range(8):
            collector.submit(request(f"r{i}", [i] * 1000, 100))
        first, second = busy.has(), idle.has()
        assert (len(first), len(second)) == (4, 4)
        busy.say(EngineOutput(first[0], [1], cached_tokens=0))
        for name in second:
            idle.say(EngineOutput(name, [1], finish_reason="length", cached_tokens=0))
        await moved(group)
        assert set(busy.has()) | set(idle.has()) >= set(first)
        assert not set(busy.has()) & set(idle.has())
        gone = [name for name in first if name not in busy.has()]
        assert gone
        assert first[0] not in gone, "it has begun"
        busy.say(*(EngineOutput(name, [7], finish_reason="length", cached_tokens=0) for name in first))
        assert all(collector.outputs[name] == [] for name in gone), "what it did meanwhile is not heard of"
        idle.say(*(EngineOutput(name, [8], finish_reason="length", cached_tokens=0) for name in gone))
        assert [collector.tokens(name) for name in gone] == [[8]] * len(gone)
        assert all(collector.ended(f"r{i}") for i in range(8))
        assert group._placed == {}

    @pytest.mark.parametrize(
        ("options", "most"),
        [({}, 8), ({"placement": "least-loaded"}, 4), ({"prefix_caching": False}, 4)],
    )
    async def test_who_gets_calls_with_one_prefix(self, options: dict[str, Any], most: int) -> None:
        group, members, collector = await self.start(**options)
        for i in range(8):
            collector.submit(request(f"r{i}", [*range(3000), i], 8))
        assert max(len(member.has()) for member in members) == most
        for member in members:
            member.say(*(EngineOutput(name, [1], finish_reason="length", cached_tokens=0) for name in member.has()))
        await moved(group)
        assert group._placed == {}

    async def test_who_begins_in_the_same_message_stays(self) -> None:
        group, (busy, idle), collector = await self.start()
        for i in range(4):
            collector.submit(request(f"r{i}", [i] * 1000, 100))
        (_, second), others = busy.has(), idle.has()
        idle.say(*(EngineOutput(name, [1], finish_reason="length", cached_tokens=0) for name in others))
        busy.say(EngineOutput(second, [1], cached_tokens=0))
        await moved(group)
        assert second in busy.has()

    async def test_an_engine_that_is_back_takes_calls_that_wait(self) -> None:
        group, (alive, dead), collector = await self.start()
        for i in range(6):
            collector.submit(request(f"r{i}", [i] * 1000, 100))
        assert dead.has()
        dead._status = "restarting"
        dead.on_lost(dead._table.take_all())  # type: ignore[misc]
        dead.heard.clear()
        assert set(alive.has()) == {f"r{i}" for i in range(6)}
        dead._status = "running"
        alive.say(EngineOutput(alive.has()[0], [1], cached_tokens=0))
        await moved(group)
        back = set(dead.has())
        assert back
        assert set(alive.has()) == {f"r{i}" for i in range(6)} - back

    async def test_who_moves_there_and_back_hears_nothing_of_the_first_time(self) -> None:
        member = ScriptedMember()
        await member.start()
        collector = Collector(member)
        collector.submit(request("r", [1] * 100, 3))
        for _ in range(2):  # twice away and back, before the engine says anything
            entry = member.withdraw("r")
            assert entry is not None
            member.adopt(entry)
        first_time = EngineOutput("r", [7], cached_tokens=64)
        member.say(first_time)
        member._on_message(Withdrawn("r"))
        member.say(first_time)
        assert (collector.outputs["r"], entry.request.output_ids, entry.started) == ([], [], False)
        member._on_message(Withdrawn("r"))
        member.say(EngineOutput("r", [8], cached_tokens=0), EngineOutput("r", [9, 10], finish_reason="length"))
        assert [output.cached_tokens for output in collector.outputs["r"]] == [0, None]
        assert (collector.tokens("r"), collector.ended("r")) == ([8, 9, 10], True)

    async def test_an_abort_finds_a_call_that_has_moved(self) -> None:
        group, (_, idle), collector = await self.start()
        for i in range(4):
            collector.submit(request(f"r{i}", [i] * 1000, 100))
        idle.say(*(EngineOutput(name, [1], finish_reason="length", cached_tokens=0) for name in idle.has()))
        await moved(group)
        (name,) = [message.request.request_id for message in idle.heard if isinstance(message, Add)][2:]
        group.abort([name])
        assert idle.heard[-1] == Abort([name], keep_pages=False)
        assert name not in group._placed

    async def test_all_are_told_to_let_go(self) -> None:
        group, members, _ = await self.start()
        members[1]._status = "restarting"
        group.let_go(iter(["p", "q"]))
        assert [member.heard for member in members] == [[LetGo(["p", "q"])], []]


@pytest.mark.slow
async def test_calls_that_move_between_real_engines_are_answered_once_and_alike() -> None:
    asked = [request(f"r{i}", list(range(9 + i, 209 + i)), 12) for i in range(16)]
    async with running(EngineThread(CONFIG)) as collector:
        for each in asked:
            collector.submit(each)
        for each in asked:
            await collector.end(each.request_id)
        expected = {each.request_id: collector.tokens(each.request_id) for each in asked}
    group = EngineGroup([EngineProcess(MEMBER.model_copy(update={"max_num_seqs": 1})) for _ in range(2)])
    async with running(group) as collector:
        for each in asked:
            collector.submit(each)
        cancelled = [each.request_id for each in asked if group._placed[each.request_id][0] == 1]
        others = expected.keys() - set(cancelled)
        group.abort(cancelled)
        await moved(group)
        assert {group._placed[name][0] for name in others} == {0, 1}
        for name in others:
            assert (await collector.end(name)).finish_reason == "length"
            assert collector.tokens(name) == expected[name]
        stats = await group.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


async def test_a_real_call_that_moves_away_and_back_as_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request("r", LONG[:100], 100)
    said = threading.Event()

    def post(*args: Any) -> None:
        _post(*args)
        said.set()

    monkeypatch.setattr(thread, "_post", post)
    async with running(engine := EngineThread(CONFIG)) as collector:
        collector.submit(replace(asked, request_id="alone"))
        await collector.end("alone")
        said.clear()
        collector.submit(asked)
        assert said.wait(60), "no token"  # it is on its way, and this loop has not heard of it
        entry = engine.withdraw("r")
        assert entry is not None
        engine.adopt(replace(entry, request=replace(entry.request, output_ids=[])))  # a copy, as a process gets one
        await collector.end("r")
        assert collector.tokens("r") == collector.tokens("alone")
        stats = await engine.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def test_sums() -> None:
    total = sum_stats([EngineStats(steps=2, forward_s=0.5), EngineStats(steps=3, forward_s=0.25, restarts=1)])
    assert total == EngineStats(steps=5, forward_s=0.75, restarts=1)


def test_memory_is_split() -> None:
    import torch

    def pages(engines: int) -> int:
        config = EngineConfig(kv_memory=2**20, engines=engines)
        return size_pool(config, page_bytes=1024, max_model_len=256, device=torch.device("cpu")).num_pages

    assert (pages(1), pages(4)) == (1024, 256)
