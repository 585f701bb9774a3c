"""The most that this machine could do: a bound from its measured memory bandwidth and arithmetic rate (a roofline).

The bound is of an engine without any cost of its own, which reads each weight once per step, a shared prefix once for
all, and computes nothing twice. What fits into the processor's caches can beat it: small models on large caches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from macaw_server.bench.cases import Case
from macaw_server.config import EngineConfig
from macaw_server.models.loader import load_config

if TYPE_CHECKING:
    import torch

READ_BYTES = 2**29
MIN_GEMM_ROWS, MAX_GEMM_ROWS = 256, 8192
PROBE_S = 0.5


class MachineRates(NamedTuple):
    """Of all cores, or of the GPU: bytes read per second, and floating-point operations per second."""

    bytes_per_s: float
    flops_per_s: float


class ModelCost(NamedTuple):
    """What a dense model with full attention cannot avoid.

    Attributes:
        weight_bytes: Read in each step.
        body_flops: Per token of prompt or answer, without attention.
        head_flops: Per token that is sampled.
        attention_flops: Per token and token that it attends to.
        kv_bytes: Keys and values of one token.
    """

    weight_bytes: int
    body_flops: int
    head_flops: int
    attention_flops: int
    kv_bytes: int


def measure_machine(dtype: torch.dtype, device: torch.device) -> MachineRates:
    """Read half a GiB and multiply matrices, for some seconds, with all cores; the best rate of each.

    A processor without arithmetic in `dtype` can widen to float32 first: the faster of both counts.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        source = torch.ones(READ_BYTES // 4, device=device)
        flops_per_s = max(_gemm_rate(each, device) for each in {dtype, torch.float32})
        return MachineRates(READ_BYTES / _best_s(source.sum, device), flops_per_s)
    finally:
        torch.set_num_threads(threads)


def _gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The best over sizes that grow as long as they take little time: where `dtype` is emulated, small ones tell."""
    import torch

    rate, rows, gemm_s = 0.0, MIN_GEMM_ROWS, 0.0
    while rows <= MAX_GEMM_ROWS and 8 * gemm_s < PROBE_S:
        matrix = torch.randn(rows, rows, device=device).to(dtype)
        gemm_s = _best_s(lambda m=matrix: m @ m, device)  # type: ignore[misc]
        rate = max(rate, 2 * rows**3 / gemm_s)
        rows *= 2
    return rate


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    import torch

    best, end = float("inf"), time.perf_counter() + PROBE_S
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def model_cost(model: str, dtype: torch.dtype) -> ModelCost | None:
    """From the model's configuration; None where its work depends on more: experts, sliding windows.

    Raises:
        ModelLoadError: No such model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    hf = load_config(EngineConfig(model=model, load_format="dummy"))  # the weights are not read
    text = hf.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or any("expert" in name for name in text.to_dict()):
        return None
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(hf)
    head = skeleton.get_output_embeddings().weight.numel()
    embedding = skeleton.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in skeleton.parameters()) - embedding - (0 if text.tie_word_embeddings else head)
    num_heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    return ModelCost(
        weight_bytes=(body + head) * dtype.itemsize,
        body_flops=2 * body,
        head_flops=2 * head,
        attention_flops=4 * text.num_hidden_layers * num_heads * head_dim,
        kv_bytes=2 * text.num_hidden_layers * num_kv_heads * head_dim * dtype.itemsize,
    )


def upper_bound(case: Case, cost: ModelCost, rates: MachineRates) -> float:
    """Output tokens per second that no engine can exceed on this case: prefill, then one step per further token."""
    n, prefix, own = case.concurrency, case.prefix_len, case.own_len
    num_prefixes = 1 if case.shared else n

    def least_s(flops: float, kv_tokens: float) -> float:
        num_bytes = cost.weight_bytes + cost.kv_bytes * kv_tokens
        return max(flops / rates.flops_per_s, num_bytes / rates.bytes_per_s)

    computed = n * own + (0 if case.warm else num_prefixes * prefix)
    attended = n * (own * prefix + own**2 / 2) + (0 if case.warm else num_prefixes * prefix**2 / 2)
    flops = computed * cost.body_flops + n * cost.head_flops + attended * cost.attention_flops
    total_s = least_s(flops, num_prefixes * prefix if case.warm else 0)
    for i in range(1, case.output_len):
        rest = own + i
        flops = n * (cost.body_flops + cost.head_flops + (prefix + rest) * cost.attention_flops)
        total_s += least_s(flops, num_prefixes * prefix + n * rest)
    return n * case.output_len / total_s
