"""The machine's bound: exact arithmetic of what a model cannot avoid."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import tiny_models
from macaw_server.bench.cases import Case
from macaw_server.bench.limits import MachineRates, ModelCost, measure_machine, model_cost, upper_bound

COST = ModelCost(weight_bytes=1000, body_flops=10, head_flops=5, attention_flops=1, kv_bytes=2)
MEMORY_BOUND = MachineRates(bytes_per_s=1000, flops_per_s=math.inf)
COMPUTE_BOUND = MachineRates(bytes_per_s=math.inf, flops_per_s=1000)


def test_memory_bound_decoding_reads_the_weights_and_a_shared_prefix_once() -> None:
    shared = Case(4, True, True, prefix_len=100, own_len=10, output_len=2)
    prefill_s, decode_s = 1.0 + 2 * 100 / 1000, 1.0 + 2 * (100 + 4 * 11) / 1000
    assert upper_bound(shared, COST, MEMORY_BOUND) == pytest.approx(8 / (prefill_s + decode_s))
    prefill_s, decode_s = 1.0 + 2 * 400 / 1000, 1.0 + 2 * (400 + 4 * 11) / 1000
    unshared = replace(shared, shared=False)
    assert upper_bound(unshared, COST, MEMORY_BOUND) == pytest.approx(8 / (prefill_s + decode_s))


def test_compute_bound_prefill_computes_a_shared_prefix_once() -> None:
    cold = Case(4, True, False, prefix_len=100, own_len=10, output_len=2)
    attention = 4 * (10 * 100 + 50) + 100 * 100 / 2
    prefill_flops = (100 + 4 * 10) * 10 + 4 * 5 + attention
    decode_flops = 4 * (15 + 111)
    assert upper_bound(cold, COST, COMPUTE_BOUND) == pytest.approx(8 * 1000 / (prefill_flops + decode_flops))
    assert upper_bound(replace(cold, warm=True), COST, COMPUTE_BOUND) > upper_bound(cold, COST, COMPUTE_BOUND)
    assert upper_bound(replace(cold, shared=False), COST, COMPUTE_BOUND) < upper_bound(cold, COST, COMPUTE_BOUND)


@pytest.mark.parametrize("tied", [True, False])
def test_the_cost_of_a_model(tmp_path: Path, tied: bool) -> None:
    model = tiny_models.save_model(tmp_path, "llama", tie_word_embeddings=tied)
    cost = model_cost(str(tmp_path), torch.bfloat16)
    embedding = tiny_models.VOCAB_SIZE * 64
    body = sum(p.numel() for p in model.parameters()) - embedding * (1 if tied else 2)
    assert cost == ModelCost(
        weight_bytes=2 * (body + embedding),
        body_flops=2 * body,
        head_flops=2 * embedding,
        attention_flops=4 * 4 * 4 * 16,
        kv_bytes=2 * 4 * 2 * 16 * 2,
    )


@pytest.mark.parametrize("model_type", ["mixtral", "gemma2"])
def test_experts_and_windows_have_no_bound(tmp_path: Path, model_type: str) -> None:
    tiny_models.make_model(model_type).config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == model_type
    assert model_cost(str(tmp_path), torch.float32) is None


@pytest.mark.slow
def test_the_machine_has_rates_and_keeps_its_threads() -> None:
    threads = torch.get_num_threads()
    rates = measure_machine(torch.float32, torch.device("cpu"))
    assert min(rates) > 0
    assert math.isfinite(max(rates))
    assert torch.get_num_threads() == threads
