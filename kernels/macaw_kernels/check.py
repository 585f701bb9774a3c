"""Every backend of a device against the reference: what ``macaw kernels check`` runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from macaw_kernels.attention import attend
from macaw_kernels.backends import BACKENDS
from macaw_kernels.planner import plan
from macaw_kernels.profiles import ALWAYS_SHARE, NEVER_SHARE
from macaw_kernels.reference import reference_attend
from macaw_kernels.types import HeadConfig

PAGE_SIZE = 16
_EPSILON = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
"""Error relative to the largest value: some roundings of the output."""


class CheckResult(NamedTuple):
    """One case on one backend: the largest error, and what is accepted."""

    backend: str
    case: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= self.limit


def check_backends(device: torch.device) -> Iterator[CheckResult]:
    """Yield the results of all cases: head dims, dtypes and options, shared and not, decodes and chunks."""
    sinks = torch.linspace(-2, 2, 8, device=device)
    options: list[dict[str, Any]] = [{}, {"window": 100}, {"soft_cap": 2.0}, {"sinks": sinks}]
    for dtype in _EPSILON:
        for head_dim in (64, 80, 96, 128, 256):
            for option in options if head_dim == 128 else options[:1]:
                yield from _check(device, dtype, HeadConfig(8, 2, head_dim, head_dim), option)


def _check(
    device: torch.device, dtype: torch.dtype, heads: HeadConfig, options: dict[str, Any]
) -> Iterator[CheckResult]:
    """Three groups of sequences below a common prefix; the slots of nobody are NaN."""
    generator = random.Random(0)
    free = generator.sample(range(200), 200)
    system = [free.pop() for _ in range(20)]
    tables, contexts, queries = [], [], []
    for _ in range(3):
        document = [free.pop() for _ in range(10)]
        for own, query in ((1, 1), (40, 1), (70, 33)):
            tables.append(system + document + [free.pop() for _ in range(-(-own // PAGE_SIZE))])
            contexts.append(30 * PAGE_SIZE + own)
            queries.append(query)
    torch.manual_seed(0)
    k_pages, v_pages = (torch.randn(200, PAGE_SIZE, heads.num_kv_heads, heads.head_dim) for _ in range(2))
    for table, context in zip(tables, contexts, strict=True):
        if context % PAGE_SIZE:
            k_pages[table[-1], context % PAGE_SIZE :] = v_pages[table[-1], context % PAGE_SIZE :] = torch.nan
    k_pages, v_pages = k_pages.to(device, dtype), v_pages.to(device, dtype)
    q = torch.randn(sum(queries), heads.num_q_heads, heads.head_dim).to(device, dtype)
    scale = heads.head_dim**-0.5
    truth = reference_attend(
        q, k_pages, v_pages, tables, contexts, queries, scale=scale, dtype=torch.float64, **options
    )  # fmt: skip
    for name, backend in BACKENDS.items():
        if not backend.supports(heads, device, dtype):
            continue
        for profile in (ALWAYS_SHARE, NEVER_SHARE):
            step_plan = plan(tables, contexts, queries, heads, profile, PAGE_SIZE)
            out = torch.full_like(q, torch.nan)
            attend(q, k_pages, v_pages, step_plan, out, scale=scale, backend=name, **options)
            case = f"{str(dtype)[6:]} d{heads.head_dim} {profile.name} {'+'.join(options) or '-'}"
            limit = _EPSILON[dtype] * float(truth.abs().max())
            yield CheckResult(name, case, float((out.double() - truth).abs().max()), limit)
