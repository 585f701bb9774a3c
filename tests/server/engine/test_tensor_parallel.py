"""An engine of several ranks answers as one of a single rank does, and lives and dies as a whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch

from collector import running
from macaw_kernels import CPU_TORCH
from macaw_server.config import EngineConfig
from macaw_server.engine.process import EngineProcess
from macaw_server.engine.ranks import Seat
from macaw_server.engine.tensor_parallel import LeadingRunner, TensorParallel, follow, rank_device
from macaw_server.engine.thread import EngineThread
from macaw_server.engine.types import EngineRequest, EngineStats, SamplingParams
from macaw_server.errors import ConfigError, StartupError
from macaw_server.models import loader
from macaw_server.models.probe import prepare
from macaw_server.models.sharding import sharding
from tiny_models import ARCHITECTURES, make_model, prompts, save_model

WITHOUT_PLAN = ("gpt2", "gpt_oss", "opt", "stablelm")
"""Transformers 5.24 has none for their layers."""


WITH_ALL_HEADS = {"deepseek_v3", "granitemoe", "olmo2", "olmo3", "olmoe", "phi3"}
"""Its plans for these leave attention whole, or gather it; each rank of the others has its share of the heads."""
PAGE_BYTES = 4 * 2 * 2 * 16 * 4 * 4
"""Of the tiny models: 4 layers, K and V of 2 heads of 16 float32, 4 tokens."""


def config_of(folder: Path | str, num_ranks: int, **overrides: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), dtype="float32", tensor_parallel_size=num_ranks, **overrides)


def alive(pids: Seq[int | None]) -> list[int]:
    return [pid for pid in pids if pid is not None and Path(f"/proc/{pid}").exists()]


async def run(
    engine: EngineProcess | EngineThread, requests: Seq[EngineRequest]
) -> tuple[dict[str, list[int]], EngineStats]:
    async with running(engine) as collector:
        for request in requests:
            collector.submit(request)
        for request in requests:
            assert (await collector.end(request.request_id)).finish_reason == "length"
        stats = await engine.stats()
        pids = engine.pids if isinstance(engine, EngineProcess) else []
    assert alive(pids) == []
    return {request.request_id: collector.tokens(request.request_id) for request in requests}, stats


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3_moe"])
async def test_two_ranks_answer_as_one(model_type: str, tmp_path: Path) -> None:
    save_model(tmp_path, model_type)
    greedy = SamplingParams(max_tokens=48, temperature=0)
    requests = [EngineRequest(f"r{i}", prompt, greedy) for i, prompt in enumerate(prompts())]

    def cramped(num_ranks: int) -> EngineConfig:
        """A pool of 30 pages, and a budget that prefills in chunks."""
        return config_of(
            tmp_path,
            num_ranks,
            page_size=4,
            max_model_len=96,
            kv_memory=30 * PAGE_BYTES // num_ranks,
            max_num_seqs=6,
            max_num_batched_tokens=24,
            sharing="always",
            speculative_tokens=3,
            speculative_ridge=1e6,
            native=False,
        )

    expected, _ = await run(EngineThread(cramped(1)), requests)
    engine = EngineProcess(cramped(2))
    answers, stats = await run(engine, requests)
    assert answers == expected
    assert (engine.info.num_pages, engine.info.page_bytes) == (30, PAGE_BYTES // 2)
    assert engine.info.backend == "transformers"
    assert stats.preemptions > 0, "the pool is to be too small"
    assert stats.cached_tokens > 0, "prefixes are to be shared"
    assert stats.draft_tokens > 0 or model_type != "llama"  # the others do not repeat themselves
    assert stats.pages_used == 0


@pytest.mark.slow
async def test_random_weights_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    """And those that a single rank makes of the seed."""
    save_model(tmp_path, "llama")
    requests = [EngineRequest("r", prompts()[0], SamplingParams(max_tokens=12, temperature=0))]
    dummy = {"load_format": "dummy", "seed": 5, "max_model_len": 128}
    expected, _ = await run(EngineThread(config_of(tmp_path, 1, **dummy)), requests)
    assert (await run(EngineProcess(config_of(tmp_path, 2, **dummy)), requests))[0] == expected


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
async def test_a_rank_that_dies_takes_the_engine_along_and_requests_go_on(victim: int, tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    requests = [
        EngineRequest("greedy", prompts()[0], SamplingParams(max_tokens=60, temperature=0)),
        EngineRequest("sampled", prompts()[1], SamplingParams(max_tokens=60, seed=5, top_p=0.9)),
        EngineRequest("penalised", [7], SamplingParams(max_tokens=60, seed=1, frequency_penalty=1.0)),
    ]
    expected, _ = await run(EngineThread(config_of(tmp_path, 1, native=False)), requests)
    engine = EngineProcess(config_of(tmp_path, 2))
    async with running(engine) as collector:
        for request in requests:
            collector.submit(request)
        while len(collector.tokens("sampled")) < 10:
            await collector.some_output()
        before = engine.pids
        assert len(alive(before)) == 2
        os.kill(alive(before)[victim], signal.SIGKILL)
        for request in requests:
            assert (await collector.end(request.request_id)).finish_reason == "length"
        assert {name: collector.tokens(name) for name in expected} == expected
        assert (await engine.stats()).restarts == 1
        assert alive(before) == []
        after = engine.pids
    assert alive(after) == []


@pytest.mark.slow
async def test_ranks_that_cannot_load_leave_nothing_behind(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    engine = EngineProcess(config_of(tmp_path, 2, max_model_len=512, kv_memory=PAGE_BYTES))
    with pytest.raises(StartupError, match="fewer than the context"):
        await engine.start()
    pids = engine.pids
    assert engine.status == "failed"
    await engine.stop()
    assert alive(pids) == []


async def test_an_engine_in_a_thread_has_one_rank() -> None:
    engine = EngineThread(EngineConfig(tensor_parallel_size=2))
    with pytest.raises(ConfigError, match="in a thread has one rank"):
        await engine.start()


@pytest.mark.parametrize(
    ("model_type", "num_ranks", "message"),
    [
        ("llama", 3, "does not divide the 4 attention heads and 2 KV heads.*Accepted: 1, 2"),
        ("llama", 4, "does not divide"),
        *((model_type, 2, "has no tensor-parallel plan") for model_type in WITHOUT_PLAN),
    ],
)
def test_what_cannot_be_spread_is_refused(model_type: str, num_ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sharding(config_of("tiny", num_ranks), make_model(model_type).config)


def test_int8_weights_are_for_one_rank() -> None:
    with pytest.raises(ConfigError, match="runs on one rank"):
        sharding(config_of("tiny", 2, quantization="int8"), make_model("llama").config)


def test_every_rank_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = config_of("tiny", 2)
    assert [rank_device(config, rank) for rank in range(2)] == [torch.device("cuda:0"), torch.device("cuda:1")]
    with pytest.raises(ConfigError, match="4 is over the 2 GPUs"):
        rank_device(config_of("tiny", 4), 0)
    with pytest.raises(ConfigError, match="Use --device cuda;"):
        rank_device(config_of("tiny", 2, device="cuda:1"), 0)


def test_ranks_agree_on_the_smallest_pool() -> None:
    pairs = [multiprocessing.Pipe() for _ in range(2)]
    seats = [Seat(0, tuple(a for a, _ in pairs)), *(Seat(i + 1, (b,)) for i, (_, b) in enumerate(pairs))]
    agreed = []
    threads = [
        threading.Thread(target=lambda seat=seat, own=own: agreed.append(seat.smallest(own)))
        for seat, own in zip(seats, [(40, 512), (30, 480), (35, 512)], strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert agreed == [(30, 480)] * 3


class _Broken:
    def run(self, chunks: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")


def _run_broken_steps(seat: Seat) -> None:
    if seat.rank == 0:
        LeadingRunner(_Broken(), seat).run([])
    else:
        follow(_Broken(), seat)


@pytest.mark.slow
def test_a_step_that_fails_ends_its_rank() -> None:
    spawn = multiprocessing.get_context("spawn")
    a, b = spawn.Pipe()
    processes = [
        spawn.Process(target=_run_broken_steps, args=(seat,), daemon=True) for seat in (Seat(0, (a,)), Seat(1, (b,)))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 1


def _logits_of_ranks(seat: Seat, folders: Seq[Path], answers: Any) -> None:
    """Main function of a rank: the logits of every model, which also answers alike through pages."""
    ranks = None
    for folder in folders:
        config = config_of(folder, 2)
        ranks = ranks or TensorParallel(config, seat)
        hf = loader.load_config(config)
        model = loader.load_model(config, hf, ranks.device, torch.float32, lambda _: None)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompts()[0]]), use_cache=False).logits
        num_heads = {
            spec.heads.num_q_heads
            for spec in prepare(model, config, lambda heads: CPU_TORCH, lambda: 128).layers.values()
        }
        if ranks.leads:
            answers.send((folder.name, logits.numpy(), num_heads))
    assert ranks is not None
    ranks.leave()


@pytest.mark.slow
def test_every_plan_is_that_of_its_model(tmp_path: Path) -> None:
    """Sharded, each architecture computes what it computes as a whole."""
    expected = {}
    for model_type in sorted(set(ARCHITECTURES) - set(WITHOUT_PLAN)):
        model = save_model(tmp_path / model_type, model_type)
        with torch.inference_mode():
            expected[model_type] = model(input_ids=torch.tensor([prompts()[0]]), use_cache=False).logits
    spawn = multiprocessing.get_context("spawn")
    (a, b), (ours, theirs) = spawn.Pipe(), spawn.Pipe()
    folders = [tmp_path / model_type for model_type in expected]
    processes = [
        spawn.Process(target=_logits_of_ranks, args=(seat, folders, theirs), daemon=True)
        for seat in (Seat(0, (a,)), Seat(1, (b,)))
    ]
    for process in processes:
        process.start()
    for end in (a, b, theirs):
        end.close()
    whole = set()
    for _ in expected:
        model_type, logits, num_heads = ours.recv()
        stock = expected[model_type]
        error = (torch.from_numpy(logits) - stock).abs().max() / stock.std()
        assert error < 1e-4, model_type
        assert num_heads in ({2}, {4})
        whole |= {model_type} if num_heads == {4} else set()
    assert whole == WITH_ALL_HEADS
    for process in processes:
        process.join()
        assert process.exitcode == 0
