"""`attend` against the dense reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.batches import THREE_LEVELS, Batch, Seq, forests, make_batch, sdpa
from macaw_kernels import (
    ALWAYS_SHARE,
    BACKENDS,
    CPU_TORCH,
    NEVER_SHARE,
    AttentionPlan,
    DeviceProfile,
    HeadConfig,
    attend,
    torch_backend,
    torch_layout,
)

GQA = HeadConfig(8, 2, 64, 64)
PROFILES = pytest.mark.parametrize("profile", [ALWAYS_SHARE, NEVER_SHARE, CPU_TORCH], ids=lambda profile: profile.name)
SINKS = torch.linspace(-3, 3, GQA.num_q_heads)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 16},
    {"window": 33},
    {"window": 90},
    {"window": 100_000},
    {"soft_cap": 1.5},
    {"sinks": SINKS},
    {"window": 37, "soft_cap": 2.0, "sinks": SINKS},
]


def backends(batch: Batch) -> list[str]:
    """Those that take the batch."""
    return [name for name, each in BACKENDS.items() if each.supports(batch.heads, batch.q.device, batch.q.dtype)]


def check(batch: Batch, profile: DeviceProfile, **options: Any) -> None:
    """Every backend gives the reference's answer."""
    expected = batch.reference(**options)
    for backend in backends(batch):
        got = batch.attend(profile, backend=backend, **options)
        torch.testing.assert_close(
            got.double(), expected, rtol=2e-5, atol=2e-6, msg=lambda text, name=backend: f"{name}: {text}"
        )


@PROFILES
@pytest.mark.parametrize("group_size", [1, 4, 8])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (24, 40)])
def test_head_shapes(profile: DeviceProfile, group_size: int, dims: tuple[int, int]) -> None:
    check(make_batch(THREE_LEVELS, HeadConfig(2 * group_size, 2, *dims)), profile)


@PROFILES
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("shuffle", [True, False], ids=["scattered", "consecutive"])
def test_options(profile: DeviceProfile, options: dict[str, Any], shuffle: bool) -> None:
    check(make_batch(THREE_LEVELS, GQA, shuffle=shuffle), profile, **options)


def test_mqa_and_odd_page_size() -> None:
    check(make_batch(THREE_LEVELS, HeadConfig(5, 1, 64, 64), page_size=7), ALWAYS_SHARE)


@PROFILES
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_owner_writes_the_shared_pages_in_the_same_step(profile: DeviceProfile, options: dict[str, Any]) -> None:
    """The first sequence's chunk covers pages that the others already decode against."""
    sequences = [
        Seq({"doc": 4}, own=0, query=64),
        Seq({"doc": 4}, own=9, query=30),
        Seq({"doc": 4}, own=1),
        Seq({"doc": 4}, own=20),
    ]
    check(make_batch(sequences, GQA), profile, **options)


@PROFILES
@pytest.mark.parametrize("own", [0, 1, 15, 16, 17, 32])
@pytest.mark.parametrize("query", [1, 2, 16, 17])
def test_around_page_boundaries(profile: DeviceProfile, own: int, query: int) -> None:
    sequences = [Seq({"doc": 2}, own, query), Seq({"doc": 2}, own=3), Seq({"doc": 2}, own=16)]
    check(make_batch(sequences, GQA), profile)


def test_chunks_longer_than_a_mask_block() -> None:
    rows = torch_layout.MASK_ROWS + 44
    sequences = [
        Seq({"doc": 3}, own=rows, query=rows),
        Seq({"doc": 3}, own=rows + 50, query=rows),
        Seq({"doc": 3}),
    ]
    batch = make_batch(sequences, HeadConfig(2, 1, 16, 16))
    for window in (None, 40, rows - 1, rows + 20):
        check(batch, ALWAYS_SHARE, window=window)


@PROFILES
@pytest.mark.parametrize("hidden", [0, 1, 2])
def test_window_about_as_long_as_the_context(profile: DeviceProfile, hidden: int) -> None:
    sequences = [Seq({"doc": 4}, own=9), Seq({"doc": 4}, own=9), Seq({"doc": 4}, own=8, query=6)]
    check(make_batch(sequences, GQA), profile, window=4 * 16 + 9 - hidden)


@PROFILES
def test_strided_queries_and_output(profile: DeviceProfile) -> None:
    """As a model hands them over: ``[heads, tokens, head_dim]`` in memory."""
    batch = make_batch(THREE_LEVELS, GQA)
    q = batch.q.transpose(0, 1).contiguous().transpose(0, 1)
    for backend in backends(batch):
        out = torch.full((8, len(q), 64), torch.nan).transpose(0, 1)
        attend(q, batch.k_pages, batch.v_pages, batch.plan(profile), out, scale=batch.scale, backend=backend)
        torch.testing.assert_close(out.double(), batch.reference(), rtol=2e-5, atol=2e-6)


def test_dense_path_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "MAX_SCORES", 1000)
    batch = make_batch(THREE_LEVELS, GQA)
    for options in OPTIONS:
        check(batch, ALWAYS_SHARE, **{"soft_cap": 3.0, **options})


@PROFILES
def test_one_plan_serves_layers_with_different_options(profile: DeviceProfile) -> None:
    batch = make_batch(THREE_LEVELS, GQA)
    plan = batch.plan(profile)
    for options in (*OPTIONS, *reversed(OPTIONS)):
        for backend in backends(batch):
            got = attend(batch.q, batch.k_pages, batch.v_pages, plan, scale=batch.scale, backend=backend, **options)
            torch.testing.assert_close(got.double(), batch.reference(**options), rtol=2e-5, atol=2e-6)


# Errors relative to PyTorch's own attention


@PROFILES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_sdpa(profile: DeviceProfile, dtype: torch.dtype) -> None:
    sequences = [
        *THREE_LEVELS,
        Seq({"system": 3, "long": 60}, own=100, query=64),
        Seq({"system": 3, "long": 60}),
    ]
    batch = make_batch(sequences, GQA, dtype=dtype)
    truth = batch.reference()
    theirs = sdpa(batch).double() - truth
    for backend in backends(batch):
        got = batch.attend(profile, backend=backend)
        assert got.dtype == dtype
        ours = got.double() - truth
        assert ours.norm() <= 2 * theirs.norm(), backend
        assert ours.abs().max() <= 2 * theirs.abs().max(), backend


# Any forest


@settings(max_examples=60, deadline=None)
@given(
    sequences=forests(),
    group_size=st.sampled_from([1, 2, 4]),
    profile=st.sampled_from([ALWAYS_SHARE, NEVER_SHARE, CPU_TORCH]),
    window=st.none() | st.integers(1, 80),
    soft_cap=st.none() | st.just(2.0),
)
def test_any_forest(
    sequences: list[Seq], group_size: int, profile: DeviceProfile, window: int | None, soft_cap: float | None
) -> None:
    batch = make_batch(sequences, HeadConfig(2 * group_size, 2, 16, 16), page_size=8)
    check(batch, profile, window=window, soft_cap=soft_cap)


# What is refused


def test_no_tokens() -> None:
    batch = make_batch([], GQA)
    assert batch.attend(CPU_TORCH).shape == (0, 8, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 8, 64)}, r"q has shape \(1, 8, 64\), the plan needs \(2, 8, 64\)"),
        ({"q": torch.zeros(2, 8, 64, dtype=torch.float64)}, "float64"),
        ({"q": torch.zeros(2, 8, 64, dtype=torch.bfloat16)}, "k_pages torch.float32"),
        ({"k_pages": torch.zeros(9, 8, 2, 64)}, "k_pages has shape"),
        ({"v_pages": torch.zeros(9, 16, 2, 32)}, "v_pages has shape"),
        ({"k_pages": torch.zeros(2, 16, 2, 64), "v_pages": torch.zeros(2, 16, 2, 64)}, "k_pages has 2 pages"),
        ({"k_pages": torch.zeros(9, 2, 16, 64).transpose(1, 2)}, "contiguous"),
        ({"out": torch.zeros(2, 8, 65)}, "out has shape"),
        ({"window": 0}, "window is 0; at least 1"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0; more than 0"),
        ({"sinks": torch.zeros(2)}, "sinks has shape"),
        ({"backend": "cuda"}, r"backend 'cuda' does not take .* on cpu; \[.*'torch'\] do"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    batch = make_batch([Seq(own=20), Seq({"doc": 3}, own=20)], GQA)
    assert len(batch.k_pages) == 9
    plan: AttentionPlan = batch.plan(CPU_TORCH)
    arguments = {"q": batch.q, "k_pages": batch.k_pages, "v_pages": batch.v_pages, "plan": plan, "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        attend(**{**arguments, **change})
