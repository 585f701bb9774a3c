"""The native CPU kernels: what `test_attend` does not ask of every backend."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from kernels.batches import THREE_LEVELS, Seq, make_batch
from macaw_kernels import ALWAYS_SHARE, NEVER_SHARE, DeviceProfile, HeadConfig, best_backend
from macaw_kernels.backends import native_available
from macaw_kernels.cpu import attention as native

pytestmark = pytest.mark.skipif(not native_available(), reason="no native kernels on this machine; the log says why")

LONG = [*THREE_LEVELS, Seq({"system": 3, "long": 30}, own=400, query=300), Seq({"system": 3, "long": 30}, own=500)]
"""Enough keys and rows to be split over threads."""


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("profile", [ALWAYS_SHARE, NEVER_SHARE], ids=lambda profile: profile.name)
@pytest.mark.parametrize("heads", [HeadConfig(14, 2, 64, 64), HeadConfig(37, 1, 32, 32)], ids=["gqa", "mqa"])
def test_any_number_of_threads(num_threads: int, profile: DeviceProfile, heads: HeadConfig) -> None:
    batch = make_batch(LONG, heads)
    sinks = torch.linspace(-3, 3, heads.num_q_heads)
    for options in ({}, {"window": 300, "sinks": sinks}):
        torch.set_num_threads(num_threads)
        got = batch.attend(profile, backend="native", **options)
        torch.set_num_threads(1)
        torch.testing.assert_close(got.double(), batch.reference(**options), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_and_pages_of_different_dtypes(q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    batch = make_batch(THREE_LEVELS, HeadConfig(6, 2, 80, 64))
    batch.q = batch.q.to(q_dtype)
    batch.k_pages, batch.v_pages = batch.k_pages.to(kv_dtype), batch.v_pages.to(kv_dtype)
    assert native.supports(batch.heads, q_dtype, kv_dtype)
    out = torch.full((*batch.q.shape[:2], 64), torch.nan, dtype=q_dtype)
    none = {"window": None, "soft_cap": None, "sinks": None}
    native.attend(batch.q, batch.k_pages, batch.v_pages, batch.plan(ALWAYS_SHARE), out, scale=batch.scale, **none)
    tolerance = 3e-6 if q_dtype == torch.float32 else 8e-3
    torch.testing.assert_close(out.double(), batch.reference(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("profile", [ALWAYS_SHARE, NEVER_SHARE], ids=lambda profile: profile.name)
@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 7, 8, 16])
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (64, 96), (128, 128), (256, 64)], ids=str)
def test_bfloat16_is_as_exact_as_torchs_own(profile: DeviceProfile, group_size: int, dims: tuple[int, int]) -> None:
    """Weights may be rounded to bfloat16 before they meet the values, as PyTorch's attention does."""
    batch = make_batch(LONG, HeadConfig(2 * group_size, 2, *dims))
    batch.q, batch.k_pages, batch.v_pages = (x.bfloat16() for x in (batch.q, batch.k_pages, batch.v_pages))
    for options in ({}, {"window": 300, "soft_cap": 5.0, "sinks": torch.linspace(-3, 3, 2 * group_size)}):
        expected = batch.reference(**options)
        got = batch.attend(profile, backend="native", **options).double()
        nearest = (expected.bfloat16().double() - expected).abs().max()
        assert (got - expected).abs().max() <= 2 * nearest + 2**-8 * expected.abs().max()
        assert (got - expected).abs().mean() <= 2 * (expected.bfloat16().double() - expected).abs().mean()


@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0])
def test_scores_of_any_size(scale: float) -> None:
    """Exponentials neither overflow nor become all zero."""
    batch = make_batch(LONG, HeadConfig(4, 2, 64, 64))
    batch.q *= scale
    for profile in (ALWAYS_SHARE, NEVER_SHARE):
        got = batch.attend(profile, backend="native", sinks=torch.tensor([-1e4, 0.0, 10.0, 1e4]))
        expected = batch.reference(sinks=torch.tensor([-1e4, 0.0, 10.0, 1e4]))
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


def test_what_goes_to_torch() -> None:
    cpu = torch.device("cpu")
    assert best_backend(HeadConfig(8, 2, 64, 64), cpu, torch.bfloat16) == "native"
    assert best_backend(HeadConfig(8, 2, 64, 64), cpu, torch.float16) == "torch"
    assert best_backend(HeadConfig(8, 2, 320, 64), cpu, torch.float32) == "torch"
    assert best_backend(HeadConfig(8, 2, 64, 64), torch.device("meta"), torch.float32) == "torch"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler)"),
        ({"CXX": "", "PATH": ""}, "no C++ compiler (g++, clang++, c++)"),
        ({"CXX": "false"}, "does not run"),
        ({"MACAW_NATIVE": "0"}, "MACAW_NATIVE=0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_without_a_compiler_torch_does_it_and_says_so_once(environment: dict[str, str], reason: str) -> None:
    script = (
        "import logging; logging.basicConfig()\n"
        "from kernels.batches import *\n"
        "from macaw_kernels import NEVER_SHARE, best_backend\n"
        "batch = make_batch([Seq(own=20)], HeadConfig(4, 2, 64, 64))\n"
        "for _ in range(2):\n"
        "    torch.testing.assert_close(batch.attend(NEVER_SHARE).double(), batch.reference(), rtol=2e-5, atol=2e-6)\n"
        "print(best_backend(batch.heads, batch.q.device, batch.q.dtype))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "torch\n", done.stderr
    assert done.stderr.count("several times slower") == 1
    assert reason in done.stderr


def test_available_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    native_available.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert native_available()
    assert not caplog.records
