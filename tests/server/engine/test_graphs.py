"""Decode steps as graphs say what they say without.

On a GPU with captured graphs. On the CPU what would be captured is called again for each step: so buckets, filling up
and inputs that stay where they are run here, with plans in fixed buffers where Triton interprets
(`test_graphs_interpreted.py`).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from macaw_kernels.triton.buffers import PlanBuffers
from macaw_server.engine.core import EngineCore
from macaw_server.engine.graphs import Capture, GraphError, Run, bucket_sizes
from macaw_server.engine.runner import Chunk
from macaw_server.engine.types import EngineRequest, SamplingParams
from macaw_server.models.probe import capture_graphs
from server.engine.test_exactness import NUM_OUTPUT, cramped, expected, prompts, run, variety
from tiny_models import VOCAB_SIZE, save_model

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from kernels import interpreter

    interpreter.install()

MODELS = [("mistral", {"num_hidden_layers": 2})] if INTERPRETED else [("llama", {}), ("gemma3_text", {})]


class Calls:
    """Captures nothing: a replay is a call. Counts them by the size of the batch."""

    def __init__(self, spoil: int | None = None) -> None:
        self.counts: Counter[int] = Counter()
        self.spoil = spoil

    def __call__(self, compute: Run) -> Run:
        def replay() -> torch.Tensor:
            logits = compute()
            self.counts[len(logits)] += 1
            return logits + 100 * torch.rand_like(logits) if len(logits) == self.spoil else logits

        return replay


def use_graphs(core: EngineCore, capture: Capture, max_num_seqs: int = 6) -> None:
    capture_graphs(
        core._runner,
        capture,
        max_num_seqs=max_num_seqs,
        max_model_len=core.info.max_model_len,
        num_pages=core.info.num_pages,
        vocab_size=VOCAB_SIZE,
        dtype=torch.float32,
    )


def requests() -> list[EngineRequest]:
    return [EngineRequest(f"r{i}", p, params) for i, (p, params) in enumerate(zip(prompts(), variety(), strict=True))]


def test_bucket_sizes() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(6) == [1, 2, 4, 6]
    assert bucket_sizes(32) == [1, 2, 4, 8, 16, 24, 32]
    assert bucket_sizes(65)[-3:] == [56, 64, 65]


@pytest.mark.parametrize(("model_type", "shape"), MODELS)
@pytest.mark.parametrize("overlap", [True] if INTERPRETED else [False, True])
def test_graphs_change_nothing(
    model_type: str, shape: dict[str, Any], overlap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, model_type, **shape)
    # Without `native` plain torch runs; the decoder that has this name is switched off where Triton interprets.
    config = cramped(tmp_path, device="cpu", native=INTERPRETED, overlap=overlap)
    wanted = requests() if not INTERPRETED else [replace(r, sampling=short(r)) for r in requests()[1:6]]
    plain = EngineCore(config.model_copy(update={"overlap": False}))
    answers = run(plain, wanted, late=2)
    core = EngineCore(config)
    calls = Calls()
    use_graphs(core, calls)
    assert set(calls.counts) == {1, 2, 4, 6}
    calls.counts.clear()
    sizes: Counter[int] = Counter()
    inner = core._runner.run

    def counted(chunks: list[Chunk], token_ids: Any = None) -> torch.Tensor:
        sizes[len(chunks)] += all(len(chunk.token_ids) == 1 for chunk in chunks)
        return inner(chunks, token_ids)

    monkeypatch.setattr(core._runner, "run", counted)
    for name, (tokens, logprobs) in run(core, wanted, late=2).items():
        assert tokens == answers[name][0], name
        assert logprobs == pytest.approx(answers[name][1], abs=2e-3)
    assert calls.counts[4] == sizes[4] + sizes[3]
    assert sizes[3], "batches are to be filled up"
    assert sum(calls.counts.values()) == sum(sizes.values())
    assert core.stats().pages_used == 0


def short(request: EngineRequest) -> SamplingParams:
    return replace(request.sampling, max_tokens=5)


@pytest.mark.skipif(not INTERPRETED, reason="without Triton a plan has no fixed place")
def test_a_plan_that_does_not_fit_runs_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path, "llama", num_hidden_layers=1)
    core = EngineCore(cramped(tmp_path, device="cpu"))
    calls = Calls()
    use_graphs(core, calls, max_num_seqs=2)
    calls.counts.clear()
    params = SamplingParams(max_tokens=4, temperature=0, logprobs=0)
    wanted = [EngineRequest(f"r{i}", [5, 6, 7 + i], params) for i in range(2)]
    answers = run(core, wanted)
    assert calls.counts == {2: 3}

    def refuse(*_: Any) -> None:
        raise ValueError("the plan has 9 states, its buffers hold 8: run it without a graph")

    monkeypatch.setattr(PlanBuffers, "load", refuse)
    with caplog.at_level(logging.INFO):
        assert run(core, wanted) == answers
    assert calls.counts == {2: 3}
    assert caplog.text.count("its buffers hold 8") == 1


@pytest.mark.skipif(INTERPRETED, reason="nothing of Triton in it")
class TestRefusal:
    def test_a_graph_that_says_something_else_is_not_used(self, tmp_path: Path) -> None:
        save_model(tmp_path, "llama")
        core = EngineCore(cramped(tmp_path, device="cpu", native=False))
        calls = Calls(spoil=4)
        with pytest.raises(GraphError, match=r"logits of batch 4 are .* standard deviations off \(of 0.001\)"):
            use_graphs(core, calls)
        calls.counts.clear()
        run(core, requests())
        assert not calls.counts

    def test_what_cannot_be_captured_runs_without(self, tmp_path: Path) -> None:
        save_model(tmp_path, "llama")
        core = EngineCore(cramped(tmp_path, device="cpu", native=False))

        def capture(compute: Run) -> Run:
            raise RuntimeError("operation not permitted when stream is capturing")

        with pytest.raises(GraphError, match="RuntimeError: operation not permitted"):
            use_graphs(core, capture)
        run(core, requests())

    def test_prefills_and_larger_batches_run_without(self, tmp_path: Path) -> None:
        save_model(tmp_path, "llama")
        core = EngineCore(cramped(tmp_path, device="cpu", native=False))
        calls = Calls()
        use_graphs(core, calls, max_num_seqs=2)
        calls.counts.clear()
        chunks = [Chunk([5], 0, [i], 1) for i in range(3)]
        core._runner.run(chunks)
        core._runner.run([chunks[0], Chunk([5, 6], 0, [1], 1)])
        core._runner.run([chunks[0], Chunk([5], 0, [1], 0)])
        assert not calls.counts
        core._runner.run(chunks[:2])
        assert calls.counts == {2: 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss", "qwen3"])
@pytest.mark.parametrize("switches", [{"cuda_graphs": False, "overlap": False}, {"overlap": False}, {}], ids=str)
def test_equals_transformers_on_a_gpu(
    model_type: str, switches: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The real thing: captured graphs, steps launched ahead, tokens that stay on the device."""
    model = save_model(tmp_path, model_type)
    core = EngineCore(cramped(tmp_path, device="cuda", **switches))
    if switches.get("cuda_graphs", True) and model_type != "gpt_oss":  # its experts may not be capturable
        assert "without CUDA graphs" not in caplog.text
    params = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0, logprobs=0)
    wanted = [EngineRequest(f"r{i}", prompt, params) for i, prompt in enumerate(prompts())]
    answers = run(core, wanted, late=2)
    for request in wanted:
        tokens, logprobs = expected(model, request.prompt_ids)
        assert answers[request.request_id][0] == tokens, request.request_id
        assert answers[request.request_id][1] == pytest.approx(logprobs, abs=2e-3)
    assert core.stats().preemptions > 0
    assert core.stats().pages_used == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_decode_step_is_issued_without_waiting(tmp_path: Path) -> None:
    """No operation makes the host wait, page boundaries and filters included; only reading the tokens does."""
    save_model(tmp_path, "llama")
    core = EngineCore(cramped(tmp_path, device="cuda"))
    params = [
        SamplingParams(max_tokens=30, temperature=t, top_p=0.9, top_k=20 * t, seed=1, logprobs=2) for t in (0, 1, 1)
    ]
    for i, each in enumerate(params):
        assert core.add(EngineRequest(f"r{i}", [5, 6, 7 + i], each)) is None
    for _ in range(6):
        core.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(12):
            assert all(output.error is None for output in core.step())
    finally:
        torch.cuda.set_sync_debug_mode("default")
