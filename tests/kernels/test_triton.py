"""The Triton kernels, on a GPU or in the interpreter; see `test_triton_interpreter.py` for the latter."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no GPU; test_triton_interpreter.py runs it in the interpreter", allow_module_level=True)
if INTERPRETED:
    from kernels import interpreter

    interpreter.install()

from kernels.batches import Batch, Seq, forests, make_batch, sdpa
from macaw_kernels import ALWAYS_SHARE, NEVER_SHARE, AttentionPlan, DeviceProfile, HeadConfig, Planner, attend, bench
from macaw_kernels.triton import backend, tune
from macaw_kernels.triton.buffers import PlanBuffers, num_sms
from macaw_kernels.triton.configs import kernel_config
from macaw_kernels.triton.layout import decode_capacity

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
GQA = HeadConfig(4, 1, 32, 32)
SINKS = torch.linspace(-3, 3, GQA.num_q_heads)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 9},
    {"window": 30},
    {"window": 100_000},
    {"soft_cap": 1.5},
    {"sinks": SINKS},
    {"window": 21, "soft_cap": 2.0, "sinks": SINKS},
]
PROFILES = pytest.mark.parametrize("profile", [ALWAYS_SHARE, NEVER_SHARE], ids=lambda profile: profile.name)
MIXED = [
    Seq({"system": 3, "a": 2, "a1": 1}, own=1),
    Seq({"system": 3, "a": 2, "a1": 1}, own=17),
    Seq({"system": 3, "a": 2}, own=20, query=13),
    Seq({"system": 3}, own=9),
    Seq({}, own=21, query=21),
    Seq({}, own=1),
]
"""Three levels, decodes and prefill chunks, loners, one-token tails and a page boundary, with pages of 8."""


def on_device(batch: Batch) -> Batch:
    return replace(batch, **{name: getattr(batch, name).to(DEVICE) for name in ("q", "k_pages", "v_pages")})


def check(batch: Batch, profile: DeviceProfile, **options: Any) -> None:
    there = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in options.items()}
    got = on_device(batch).attend(profile, backend="triton", **there)
    torch.testing.assert_close(got.cpu().double(), batch.reference(**options), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("group_size", "dims"),
    [
        *((4, (dim, dim)) for dim in (64, 80, 96, 128, 256)),
        (1, (64, 64)),
        (8, (64, 64)),
        (5, (24, 40)),
        (2, (192, 128)),
    ],
)
def test_head_shapes(group_size: int, dims: tuple[int, int]) -> None:
    check(make_batch(MIXED, HeadConfig(group_size, 1, *dims), page_size=8), ALWAYS_SHARE)


@PROFILES
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_options(profile: DeviceProfile, options: dict[str, Any]) -> None:
    check(make_batch(MIXED, GQA, page_size=8), profile, **options)


def test_several_kv_heads_and_an_odd_page_size() -> None:
    check(make_batch(MIXED, HeadConfig(6, 3, 16, 16), page_size=7), ALWAYS_SHARE)


@pytest.mark.parametrize("own", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("query", [1, 2, 9])
def test_around_page_boundaries(own: int, query: int) -> None:
    sequences = [Seq({"doc": 2}, own, query), Seq({"doc": 2}, own=3), Seq({"doc": 2}, own=8)]
    check(make_batch(sequences, HeadConfig(2, 1, 16, 16), page_size=8), ALWAYS_SHARE)


@pytest.mark.parametrize("window", [None, 200])
def test_split_ranges(window: int | None) -> None:
    """Shared, own and chunked: all longer than what one program reads."""
    sequences = [Seq({"doc": 20}, own=150), Seq({"doc": 20}, own=40, query=30), Seq({}, own=170)]
    batch = make_batch(sequences, HeadConfig(2, 1, 16, 16))
    plan = on_device(batch).plan(ALWAYS_SHARE)
    check(batch, ALWAYS_SHARE, window=window)
    if INTERPRETED:
        layout = backend.plan_buffers(plan, None, DEVICE, torch.float32)
        assert layout.num_states > plan.num_tokens + len(plan.shared[0].rows)


def test_strided_queries_and_output() -> None:
    """As a model hands them over: ``[heads, tokens, head_dim]`` in memory."""
    batch = on_device(make_batch(MIXED, GQA, page_size=8))
    q = batch.q.transpose(0, 1).contiguous().transpose(0, 1)
    for out in (
        torch.full((GQA.num_q_heads, len(q), 32), torch.nan, device=DEVICE).transpose(0, 1),
        torch.full((32, GQA.num_q_heads, len(q)), torch.nan, device=DEVICE).permute(2, 1, 0),
    ):
        plan = batch.plan(ALWAYS_SHARE)
        attend(q, batch.k_pages, batch.v_pages, plan, out, scale=batch.scale, backend="triton")
        torch.testing.assert_close(out.double(), batch.reference(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_sdpa(dtype: torch.dtype) -> None:
    batch = make_batch([*MIXED, Seq({"system": 3, "long": 20}, own=30, query=12)], GQA, page_size=8, dtype=dtype)
    there = on_device(batch)
    got = there.attend(ALWAYS_SHARE, backend="triton").cpu()
    assert got.dtype == dtype
    truth = batch.reference()
    ours, theirs = got.double() - truth, sdpa(there).cpu().double() - truth
    assert ours.norm() <= 2 * theirs.norm()
    assert ours.abs().max() <= 2 * theirs.abs().max()


@settings(max_examples=12 if INTERPRETED else 100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sequences=forests(),
    group_size=st.sampled_from([1, 2, 4]),
    profile=st.sampled_from([ALWAYS_SHARE, NEVER_SHARE]),
    window=st.none() | st.integers(1, 80),
    soft_cap=st.none() | st.just(2.0),
)
def test_any_forest(
    sequences: list[Seq], group_size: int, profile: DeviceProfile, window: int | None, soft_cap: float | None
) -> None:
    batch = make_batch(sequences, HeadConfig(group_size, 1, 16, 16), page_size=8)
    check(batch, profile, window=window, soft_cap=soft_cap)


def test_a_timer_runs_the_configuration_and_checks_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_LAYER_BYTES", 1)
    case = bench.Case(HeadConfig(2, 1, 16, 16), ((1, 64), (3, 40)))
    seen = []

    def watched(*args: Any, **options: Any) -> Tensor:
        seen.append(next(iter(args[3].cache.values())).config)
        return attend(*args, **options)

    monkeypatch.setattr(tune, "attend", watched)
    timer = tune.CaseTimer([case], DEVICE, torch.float32)
    first = kernel_config(DEVICE, case.heads, torch.float32)
    other = replace(first, narrow=replace(first.narrow, block_n=2 * first.narrow.block_n), min_split=128)
    assert timer(first) == 1.0
    assert 0 < timer(other) < torch.inf
    assert set(seen) == {first, other}
    monkeypatch.setattr(tune, "attend", lambda *args, **options: attend(*args, **options) + 1)
    assert timer(other) == torch.inf, "its answer is not that of the first"


# Plans in buffers of fixed size


@pytest.mark.parametrize("window", [None, 20])
def test_steps_through_the_same_buffers(window: int | None) -> None:
    """Decode steps, with new pages on the way; on a GPU one captured graph runs them all."""
    heads, page_size, steps = HeadConfig(2, 1, 16, 16), 8, 10
    sequences = [Seq({"doc": 4}, own=3 + steps), Seq({"doc": 4}, own=8 + steps), Seq({}, own=6 + steps)]
    full = make_batch(sequences, heads, page_size)
    batch = on_device(full)
    planner = Planner(heads, ALWAYS_SHARE, page_size)
    config = kernel_config(DEVICE, heads, torch.float32)
    capacity = decode_capacity(len(sequences), 20, heads.group_size, heads.num_kv_heads, config, num_sms(DEVICE))
    buffers = PlanBuffers(heads, capacity, window, DEVICE, torch.float32)
    out = torch.full((len(sequences), 2, 16), torch.nan, device=DEVICE)

    def run(plan: AttentionPlan) -> None:
        pages = batch.k_pages, batch.v_pages
        attend(batch.q, *pages, plan, out, scale=batch.scale, window=window, backend="triton")

    graph = None
    for step in (0, 1, 5, 9):
        contexts = [context - steps + step for context in full.context_lens]
        tables = [table[: -(-context // page_size)] for table, context in zip(full.block_tables, contexts, strict=True)]
        plan = planner.plan(tables, contexts, [1] * len(contexts))
        buffers.load(plan)
        out.fill_(torch.nan)
        if INTERPRETED:
            run(plan)
        else:
            if graph is None:
                run(plan)  # compiles
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run(plan)
            graph.replay()
        expected = replace(full, context_lens=contexts, query_lens=[1] * len(contexts)).reference(window=window)
        torch.testing.assert_close(out.cpu().double(), expected, rtol=2e-5, atol=2e-6)


def test_a_padded_batch_is_not_loaded() -> None:
    batch = make_batch([Seq(own=3), Seq(own=4)], GQA)
    config = kernel_config(DEVICE, GQA, torch.float32)
    buffers = PlanBuffers(GQA, decode_capacity(4, 4, 4, 1, config, 1), None, DEVICE, torch.float32)
    with pytest.raises(ValueError, match="2 query tokens, its graph 4: pad the batch"):
        buffers.load(batch.plan(ALWAYS_SHARE))


# The KV store


@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_store(num_kv_heads: int) -> None:
    """Tokens land in their slots, strided as a model has them; nothing else changes."""
    k_pages = torch.zeros(4, 8, num_kv_heads, 24, device=DEVICE)
    v_pages = torch.zeros(4, 8, num_kv_heads, 16, device=DEVICE)
    k, v = (torch.randn(num_kv_heads, 6, dim, device=DEVICE).transpose(0, 1) for dim in (24, 16))
    slots = [31, 0, 8, 9, 15]
    backend.store_kv(k, v, k_pages, v_pages, torch.tensor([*slots, 32], device=DEVICE))
    for new, pages in ((k, k_pages), (v, v_pages)):
        flat = pages.flatten(0, 1)
        assert torch.equal(flat[slots], new[:5])
        assert int((flat != 0).any(-1).any(-1).sum()) == len(slots)
