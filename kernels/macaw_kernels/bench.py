"""What attention costs here with and without sharing: the table of ``macaw kernels bench``.

A case is a tree of prefixes and one decode step of its leaves. Plain is the same kernel with nothing shared; the two
are alternated, over as many layers as keep caches from holding the keys. A case whose answers are wrong is not timed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from macaw_kernels.attention import attend
from macaw_kernels.backends import best_backend, default_profile
from macaw_kernels.planner import plan
from macaw_kernels.profiles import ALWAYS_SHARE, NEVER_SHARE
from macaw_kernels.reference import reference_attend
from macaw_kernels.types import AttentionPlan, HeadConfig

PAGE_SIZE = 16
_LAYER_BYTES = 256 << 20
_COPY_BYTES = 512 << 20
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class WrongAnswerError(Exception):
    """A backend's answer is not that of the reference; the message says by how much."""


@dataclass(frozen=True, slots=True)
class Case:
    """A decode step.

    Attributes:
        heads: Of the layer.
        levels: ``(nodes, tokens)`` from the root to the leaves; the leaves are the sequences. Tokens are multiples of
            16 above the leaves.
    """

    heads: HeadConfig
    levels: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """Nodes per level, an underscore, tokens per level."""
        return "_".join(",".join(str(level[i]) for level in self.levels) for i in (0, 1))

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.levels[-1][0]

    @property
    def context(self) -> int:
        """Tokens of each sequence."""
        return sum(tokens for _, tokens in self.levels)

    @property
    def num_pages(self) -> int:
        """Pages of all nodes."""
        return sum(nodes * -(-tokens // PAGE_SIZE) for nodes, tokens in self.levels)

    def block_tables(self) -> list[list[int]]:
        """Pages of each sequence, scattered over the pool."""
        ids = iter(random.Random(0).sample(range(self.num_pages), self.num_pages))
        nodes = [
            [[next(ids) for _ in range(-(-tokens // PAGE_SIZE))] for _ in range(count)] for count, tokens in self.levels
        ]
        return [[page for level in nodes for page in level[i * len(level) // self.batch]] for i in range(self.batch)]


class Result(NamedTuple):
    """A case's times per layer, median and spread.

    Attributes:
        case: Which.
        plain_ms: Nothing shared.
        shared_ms: As the cost model decides.
        gain: Plain over shared, of each pair: median, least, most.
        num_shared: Items that the cost model shares.
        plain_gb_s: What plain reads per second.
        roofline: Time of reading at copy speed what must be read once, over `shared_ms`.
    """

    case: Case
    plain_ms: float
    shared_ms: float
    gain: tuple[float, float, float]
    num_shared: int
    plain_gb_s: float
    roofline: float


def gpu_cases() -> Iterator[Case]:
    """The cases of the literature: FlashInfer's cascade, PAT's trees, and controls without sharing."""
    mha, gqa = HeadConfig(32, 32, 128, 128), HeadConfig(32, 8, 128, 128)
    yield Case(gqa, ((1, 6144), (64, 256)))
    yield Case(mha, ((1, 32768), (256, 256)))
    for prefix in (128, 256, 512, 1024, 2048, 4096):
        yield Case(gqa, ((1, prefix), (128, 3)))
    for heads in (mha, HeadConfig(16, 8, 128, 128), gqa, HeadConfig(64, 8, 128, 128)):
        yield Case(heads, ((1, 32), (8, 2048), (512, 256)))
    for batch in (1, 8, 64):
        yield Case(gqa, ((batch, 4096),))


def cpu_cases(heads: HeadConfig, own: int = 128) -> Iterator[Case]:
    """A grid of prefixes and batches, a tree, and controls without sharing."""
    for batch in (1, 4, 32):
        yield Case(heads, ((batch, own),))
    for prefix in (64, 256, 2048, 6000 // PAGE_SIZE * PAGE_SIZE):
        for batch in (4, 32):
            yield Case(heads, ((1, prefix), (batch, own)))
    yield Case(heads, ((1, 256), (4, 512), (32, own)))


def copy_gb_s(device: torch.device) -> float:
    """Bytes read and written by a large copy, per second / 1e9: the best of some."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(seconds(device, lambda: target.copy_(source)) for _ in range(6))
    return 2 * _COPY_BYTES / best / 1e9


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries ``[batch, heads, dim]``, keys and values ``[layers, pages, page, heads, dim]``."""
    heads = case.heads
    page_bytes = PAGE_SIZE * heads.kv_elements * dtype.itemsize
    num_layers = min(16, max(1, _LAYER_BYTES // (case.num_pages * page_bytes)))
    shape = (num_layers, case.num_pages, PAGE_SIZE, heads.num_kv_heads)
    return (
        torch.randn(case.batch, heads.num_q_heads, heads.head_dim, device=device, dtype=dtype),
        torch.randn(*shape, heads.head_dim, device=device, dtype=dtype),
        torch.randn(*shape, heads.v_head_dim, device=device, dtype=dtype),
    )


def run_case(
    case: Case, device: torch.device, dtype: torch.dtype, limit_gb_s: float, rounds: int = 9, backend: str | None = None
) -> Result:
    """Check, then time.

    Raises:
        WrongAnswerError: Nothing is timed.
        ValueError: The backend does not take the case.
    """
    heads = case.heads
    tables, contexts, queries = case.block_tables(), [case.context] * case.batch, [1] * case.batch
    chosen = default_profile(device, dtype, backend, heads)
    plain, shared, always = (
        plan(tables, contexts, queries, heads, profile, PAGE_SIZE) for profile in (NEVER_SHARE, chosen, ALWAYS_SHARE)
    )
    token_bytes = heads.kv_elements * dtype.itemsize
    q, k_pages, v_pages = make_inputs(case, device, dtype)
    num_layers = len(k_pages)
    backend = backend or best_backend(heads, device, dtype)
    scale = heads.head_dim**-0.5

    some = min(case.batch, 2)
    expected = reference_attend(
        q[:some], k_pages[0], v_pages[0], tables[:some], contexts[:some], queries[:some], scale=scale
    )
    for each in (plain, shared, always):
        answer = attend(q, k_pages[0], v_pages[0], each, scale=scale, backend=backend)[:some]
        error = (answer.float() - expected.float()).abs().max().item()
        if not error <= TOLERANCE[dtype]:
            raise WrongAnswerError(f"{case.name} on {backend}: off by {error:.2g} (accepted: {TOLERANCE[dtype]:g})")

    def step(each: AttentionPlan) -> float:
        def layers() -> None:
            for k_layer, v_layer in zip(k_pages, v_pages, strict=True):
                attend(q, k_layer, v_layer, each, scale=scale, backend=backend)

        return 1000 * seconds(device, layers) / num_layers

    pairs = [(step(plain), step(shared)) for _ in range(rounds)]
    plain_ms, shared_ms = (statistics.median(times) for times in zip(*pairs, strict=True))
    gains = [a / b for a, b in pairs]
    return Result(
        case,
        plain_ms,
        shared_ms,
        (statistics.median(gains), min(gains), max(gains)),
        len(shared.shared),
        plain.num_kv_tokens * token_bytes / plain_ms / 1e6,
        always.num_kv_tokens * token_bytes / limit_gb_s / 1e6 / shared_ms,
    )


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """How long `work` takes, what it leaves to the device included."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
