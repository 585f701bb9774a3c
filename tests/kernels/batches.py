"""Batches to attend: block tables with shared runs of pages, and pages that are NaN where nobody may read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from macaw_kernels import AttentionPlan, DeviceProfile, HeadConfig, attend, plan, reference_attend


@dataclass(slots=True)
class Seq:
    """A sequence: named runs of full pages that others may have too (``{"doc": 3}``), then own tokens."""

    path: dict[str, int] = field(default_factory=dict)
    own: int = 1
    query: int = 1


@dataclass(slots=True)
class Batch:
    """One step's inputs."""

    heads: HeadConfig
    page_size: int
    block_tables: list[list[int]]
    context_lens: list[int]
    query_lens: list[int]
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor

    def plan(self, profile: DeviceProfile) -> AttentionPlan:
        return plan(self.block_tables, self.context_lens, self.query_lens, self.heads, profile, self.page_size)

    def attend(self, profile: DeviceProfile, **options: Any) -> Tensor:
        """Run into a poisoned output."""
        out = self.q.new_full((*self.q.shape[:2], self.heads.v_head_dim), torch.nan)
        step_plan = self.plan(profile)
        returned = attend(self.q, self.k_pages, self.v_pages, step_plan, out, scale=self.scale, **options)
        assert returned is out
        return out

    def reference(self, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
        tables = (self.block_tables, self.context_lens, self.query_lens)
        return reference_attend(self.q, self.k_pages, self.v_pages, *tables, scale=self.scale, dtype=dtype, **options)

    @property
    def scale(self) -> float:
        return float(self.heads.head_dim**-0.5)


def make_batch(
    sequences: Sequence[Seq],
    heads: HeadConfig,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    shuffle: bool = True,
) -> Batch:
    """Lay the sequences out over pages in random (or ascending) order; slots of nobody are NaN."""
    runs = {name: count for seq in sequences for name, count in seq.path.items()}
    own_pages = [-(-seq.own // page_size) for seq in sequences]
    num_pages = sum(runs.values()) + sum(own_pages) + 2
    ids = list(range(num_pages))
    if shuffle:
        random.Random(1).shuffle(ids)
    pages = iter(ids)
    run_pages = {name: [next(pages) for _ in range(count)] for name, count in runs.items()}
    tables = [
        [page for name in seq.path for page in run_pages[name]] + [next(pages) for _ in range(count)]
        for seq, count in zip(sequences, own_pages, strict=True)
    ]
    contexts = [sum(seq.path.values()) * page_size + seq.own for seq in sequences]

    generator = torch.Generator().manual_seed(0)
    valid = torch.zeros(num_pages, page_size, dtype=torch.bool)
    for table, context in zip(tables, contexts, strict=True):
        offsets = torch.arange(context)
        valid[torch.tensor(table)[offsets // page_size], offsets % page_size] = True
    shape = (num_pages, page_size, heads.num_kv_heads)
    k_pages, v_pages = (
        torch.where(valid[..., None, None], torch.randn(*shape, dim, generator=generator), torch.nan).to(dtype)
        for dim in (heads.head_dim, heads.v_head_dim)
    )
    queries = [seq.query for seq in sequences]
    q = torch.randn(sum(queries), heads.num_q_heads, heads.head_dim, generator=generator).to(dtype)
    return Batch(heads, page_size, tables, contexts, queries, q, k_pages, v_pages)


THREE_LEVELS = [
    Seq({"system": 3, "a": 2, "a1": 2}, own=1),
    Seq({"system": 3, "a": 2, "a1": 2}, own=17),
    Seq({"system": 3, "a": 2}, own=16),
    Seq({"system": 3, "a": 2}, own=40, query=23),
    Seq({"system": 3, "b": 1}, own=5),
    Seq({"system": 3, "b": 1}, own=31),
    Seq({"system": 3}, own=33, query=33),
    Seq({}, own=50),
    Seq({}, own=21, query=21),
    Seq({}, own=1),
]
"""Three levels, decodes and prefill chunks, loners, one-token tails and a page boundary."""


def sdpa(batch: Batch) -> Tensor:
    """`scaled_dot_product_attention`, sequence by sequence, in the batch's dtype."""
    outs = []
    rows = batch.q.split(batch.query_lens)
    for q, table, context in zip(rows, batch.block_tables, batch.context_lens, strict=True):
        k, v = (pages[table].flatten(0, 1)[:context].transpose(0, 1) for pages in (batch.k_pages, batch.v_pages))
        mask = torch.ones(len(q), context, dtype=torch.bool).tril(context - len(q))
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], mask, scale=batch.scale, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@st.composite
def forests(draw: st.DrawFn) -> list[Seq]:
    """Sequences on random paths through a random tree of page runs."""
    parents = draw(st.lists(st.integers(-1, 5), max_size=6))
    paths: list[dict[str, int]] = [{}]
    for i, parent in enumerate(parents):
        paths.append({**paths[min(parent + 1, i)], f"run{i}": draw(st.integers(1, 4))})
    sequences = []
    for _ in range(draw(st.integers(1, 8))):
        path = draw(st.sampled_from(paths))
        own = draw(st.integers(0 if path else 1, 30))
        context = own + 8 * sum(path.values())
        query = draw(st.sampled_from([1, 1, 1, own or 1, context]) | st.integers(1, context))
        sequences.append(Seq(path, own, query))
    return sequences
