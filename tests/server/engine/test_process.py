"""The supervised engine process: output as in a thread, `kill -9`, poison, load failures."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from llguidance import LLMatcher

from collector import Collector, running
from macaw_server.config import EngineConfig
from macaw_server.engine.process import MAX_CRASHES_PER_REQUEST, EngineProcess
from macaw_server.engine.thread import EngineThread
from macaw_server.engine.types import EngineRequest, SamplingParams
from macaw_server.errors import ModelLoadError

CONFIG = EngineConfig(dtype="float32", max_model_len=2048)
WORDS = LLMatcher.grammar_from_regex("([a-z]+[ ,.])+")
REQUESTS = [
    EngineRequest("greedy", list(range(10, 60)), SamplingParams(max_tokens=300, temperature=0)),
    EngineRequest("sampled", list(range(10, 50)), SamplingParams(max_tokens=300, seed=5, top_p=0.9)),
    EngineRequest("constrained", [9, 8], SamplingParams(max_tokens=200, seed=3, temperature=2.0, grammar=WORDS)),
    EngineRequest("penalised", [7], SamplingParams(max_tokens=200, seed=1, frequency_penalty=1.0)),
]


async def answers(collector: Collector) -> dict[str, list[int]]:
    for request in REQUESTS:
        assert (await collector.end(request.request_id)).finish_reason == "length"
    return {request.request_id: collector.tokens(request.request_id) for request in REQUESTS}


@pytest.fixture
async def expected() -> dict[str, list[int]]:
    """The undisturbed answers, from an engine in a thread."""
    async with running(EngineThread(CONFIG)) as collector:
        for request in REQUESTS:
            collector.submit(request)
        result = await answers(collector)
        assert (await collector.engine.stats()).pages_used == 0
    return result


@pytest.mark.slow
async def test_kill_9_is_a_delay_and_not_an_error(expected: dict[str, list[int]]) -> None:
    engine = EngineProcess(CONFIG)
    async with running(engine) as collector:
        for request in REQUESTS:
            collector.submit(request)
        while len(collector.tokens("sampled")) < 20:
            await collector.some_output()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        assert await answers(collector) == expected
        started = [output for output in collector.outputs["greedy"] if output.cached_tokens is not None]
        assert len(started) == 1, "a client is told of the start once"
        stats = await engine.stats()
        assert stats.restarts == 1
        assert stats.pages_used == 0
        collector.submit(EngineRequest("later", [3, 4, 5], SamplingParams(max_tokens=4)))
        assert (await collector.end("later")).finish_reason == "length"


@pytest.mark.slow
async def test_a_request_that_is_there_at_every_crash_fails_and_others_go_on() -> None:
    engine = EngineProcess(CONFIG)
    async with running(engine) as collector:
        collector.submit(EngineRequest("poison", [5], SamplingParams(max_tokens=2000, temperature=0)))
        for _ in range(MAX_CRASHES_PER_REQUEST):
            await collector.some_output()
            assert engine.pid is not None
            pid = engine.pid
            os.kill(pid, signal.SIGKILL)
            while engine.pid == pid and not collector.ended("poison"):
                await engine.stats()
        end = await collector.end("poison")
        assert end.error is not None
        assert end.error[0] == "engine_failed"
        assert "died 3 times" in end.error[1]
        collector.submit(EngineRequest("innocent", [3, 4, 5], SamplingParams(max_tokens=4)))
        assert (await collector.end("innocent")).finish_reason == "length"


async def test_abort_frees_everything_and_silences_the_request() -> None:
    async with running(EngineProcess(CONFIG)) as collector:
        collector.submit(REQUESTS[0])
        await collector.some_output()
        collector.engine.abort(["greedy"])
        seen = len(collector.outputs["greedy"])
        collector.engine.abort(["never there"])
        collector.submit(EngineRequest("next", [3], SamplingParams(max_tokens=30)))
        await collector.end("next")
        assert len(collector.outputs["greedy"]) == seen
        stats = await collector.engine.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


@pytest.mark.parametrize("kind", [EngineProcess, EngineThread])
async def test_a_model_that_cannot_load_is_a_start_error(
    kind: type[EngineProcess] | type[EngineThread], tmp_path: Path
) -> None:
    engine = kind(EngineConfig(model=str(tmp_path / "nowhere")))
    with pytest.raises(ModelLoadError, match="No folder"):
        await engine.start()
    assert engine.status == "failed"
    await engine.stop()


async def test_a_request_that_can_never_fit_is_refused_by_the_engine_too() -> None:
    async with running(EngineThread(CONFIG)) as collector:
        collector.submit(EngineRequest("long", [5] * 4000, SamplingParams(max_tokens=1)))
        end = await collector.end("long")
        assert end.error is not None
        assert end.error[0] == "context_length_exceeded"
        assert "4,000" in end.error[1]
        assert "2,048" in end.error[1]
