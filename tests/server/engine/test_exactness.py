"""Greedy output in float32 equals transformers' `generate`, token for token, whatever the engine does on the way.

And with speculation, right or wrong, greedy and sampled output equal what comes without.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.types import EngineRequest, SamplingParams
from macaw_server.models.native import FAMILIES
from tiny_models import ARCHITECTURES, VOCAB_SIZE, prompts, save_model

NUM_OUTPUT = 16


def expected(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """transformers' tokens and their log-probabilities."""
    model.generation_config.eos_token_id = None  # generate falls back on it
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=NUM_OUTPUT,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    tokens = out.sequences[0, len(prompt) :].tolist()
    logprobs = [torch.log_softmax(row[0].float(), -1)[t].item() for row, t in zip(out.logits, tokens, strict=True)]
    return tokens, logprobs


def run(core: EngineCore, requests: list[EngineRequest], late: int = 0) -> dict[str, tuple[list[int], list[float]]]:
    """Run all requests; the last `late` of them arrive after two steps."""
    answers: dict[str, tuple[list[int], list[float]]] = {r.request_id: ([], []) for r in requests}
    for request in requests[: len(requests) - late]:
        assert core.add(request) is None
    steps = 0
    while core.has_work or late:
        if steps == 2 and late:
            for request in requests[-late:]:
                assert core.add(request) is None
            late = 0
        for output in core.step():
            assert output.error is None, output.error
            tokens, logprobs = answers[output.request_id]
            tokens += output.token_ids
            logprobs += [entry.logprob for entry in output.logprobs or []]
        steps += 1
    return answers


def cramped(folder: Path, **overrides: Any) -> EngineConfig:
    """A pool of fewer pages than the batch needs, and a budget that prefills every longer prompt in chunks."""
    page_bytes = EngineCore(EngineConfig(model=str(folder), dtype="float32", page_size=4)).info.page_bytes
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        page_size=4,
        max_model_len=96,
        kv_memory=30 * page_bytes,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        sharing="always",
        **overrides,
    )


@pytest.mark.parametrize(
    ("model_type", "native"),
    [
        *((model_type, True) for model_type in sorted(ARCHITECTURES)),
        *((model_type, False) for model_type in ("llama", "gemma3_text", "gpt_oss", "deepseek_v3")),
    ],
)
def test_equals_transformers(model_type: str, native: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path / model_type, model_type)
    core = EngineCore(cramped(tmp_path / model_type, native=native))
    assert core.info.backend == ("native" if native and model_type in FAMILIES else "transformers")
    params = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0, logprobs=0)
    requests = [EngineRequest(f"r{i}", prompt, params) for i, prompt in enumerate(prompts())]
    answers = run(core, requests, late=2)
    for request in requests:
        tokens, logprobs = expected(model, request.prompt_ids)
        assert answers[request.request_id][0] == tokens, request.request_id
        assert answers[request.request_id][1] == pytest.approx(logprobs, abs=2e-3)
    stats = core.stats()
    assert stats.preemptions > 0, "the pool is to be too small"
    assert stats.cached_tokens > 0, "prefixes are to be shared"
    assert stats.pages_used == 0


class HalfRight:
    """Proposes the known answer, with wrong tokens in it."""

    def __init__(self, tokens: Seq[int]) -> None:
        self.tokens = tokens
        self.random = random.Random(len(tokens))

    def propose(self, token_ids: Seq[int], limit: int) -> list[int]:
        known = self.tokens[len(token_ids) : len(token_ids) + limit]
        return [token if self.random.random() < 0.8 else self.random.randrange(VOCAB_SIZE) for token in known]


def variety() -> list[SamplingParams]:
    """Greedy and sampled requests with all that depends on the tokens before."""
    plain = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0, logprobs=0)
    return [
        plain,
        replace(plain, temperature=1.0, seed=1),
        replace(plain, temperature=0.7, seed=12, top_p=0.9, frequency_penalty=0.5, presence_penalty=0.5),
        replace(plain, repetition_penalty=1.5, logprobs=3),
        replace(plain, temperature=0.8, seed=3, top_k=20, max_tokens=NUM_OUTPUT - 3),
        replace(plain, temperature=1.2, seed=4, min_p=0.02, frequency_penalty=0.3),
        replace(plain, min_tokens=4, logit_bias={7: 3.0, 11: -3.0}),
    ]


def stopping(requests: Seq[EngineRequest], answers: Mapping[str, tuple[list[int], list[float]]]) -> list[EngineRequest]:
    """The requests, every other one of which ends with a token from the middle of its answer."""
    return [
        replace(r, sampling=replace(r.sampling, stop_token_ids=frozenset({answers[r.request_id][0][9]})))
        if i % 2
        else r
        for i, r in enumerate(requests)
    ]


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_speculation_changes_nothing(model_type: str, tmp_path: Path) -> None:
    save_model(tmp_path, model_type)
    requests = [
        EngineRequest(f"r{i}", prompt, params)
        for i, (prompt, params) in enumerate(zip(prompts(), variety(), strict=True))
    ]
    plain = EngineCore(cramped(tmp_path, speculative_tokens=0))
    whole = run(plain, requests)
    requests = stopping(requests, whole)
    expected = run(plain, requests, late=2)
    core = EngineCore(
        cramped(tmp_path, speculative_tokens=5, speculative_ridge=1e6),
        make_proposer=lambda request: HalfRight(request.prompt_ids + whole[request.request_id][0]),
    )
    answers = run(core, requests, late=2)
    for name, (tokens, logprobs) in expected.items():
        assert answers[name][0] == tokens, name
        assert answers[name][1] == pytest.approx(logprobs, abs=2e-3)
    stats = core.stats()
    assert stats.evicted_pages > 0, "the pool is to be small"
    assert 0 < stats.accepted_tokens < stats.draft_tokens, "some drafts are to be right, and some wrong"
    assert stats.steps < plain.stats().steps
    assert stats.pages_used == 0
