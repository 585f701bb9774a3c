"""Greedy output in float32 equals transformers' `generate`, token for token, whatever the engine does on the way."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.types import EngineRequest, SamplingParams
from macaw_server.models.native import FAMILIES
from tiny_models import ARCHITECTURES, VOCAB_SIZE, save_model

NUM_OUTPUT = 16


def prompts() -> list[list[int]]:
    """Shared prefixes on two levels, a prompt that is a prefix of another, lone ones, and one of a single token."""
    rng = random.Random(7)

    def ids(n: int) -> list[int]:
        return [rng.randrange(4, VOCAB_SIZE) for _ in range(n)]

    root, left = ids(32), ids(17)
    return [
        root + left + ids(5),
        root + left + ids(9),
        root + ids(3),
        root + left,
        ids(41),
        ids(1),
        root + left + ids(2),
    ]


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


@pytest.mark.parametrize(
    ("model_type", "native"),
    [
        *((model_type, True) for model_type in sorted(ARCHITECTURES)),
        *((model_type, False) for model_type in ("llama", "gemma3_text", "gpt_oss", "deepseek_v3")),
    ],
)
def test_equals_transformers(model_type: str, native: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path / model_type, model_type)
    page_bytes = EngineCore(EngineConfig(model=str(tmp_path / model_type), dtype="float32")).info.page_bytes
    core = EngineCore(
        EngineConfig(
            model=str(tmp_path / model_type),
            dtype="float32",
            page_size=4,
            max_model_len=96,
            kv_memory=30 * page_bytes // 4,  # 30 pages of 4 tokens: fewer than the batch needs
            max_num_seqs=6,
            max_num_batched_tokens=24,  # every longer prompt is prefilled in chunks
            sharing="always",
            native=native,
        )
    )
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
