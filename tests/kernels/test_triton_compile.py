"""Every variant of the Triton kernels compiles for every target, without spills and within its shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

from macaw_kernels.triton.compile import TARGETS, Resources, Variant, compile_variant, variants


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("kernel", ["narrow", "wide", "merge", "store"])
@pytest.mark.parametrize("target", TARGETS)
def test_sound(target: str, kernel: str) -> None:
    took = compile_variant(Variant(target, kernel, "bf16", 128))
    assert took.sound, took
    assert took.registers > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_all_variants_are_sound(target: str, dtype: str) -> None:
    chosen = [variant for variant in variants((target,), all_features=False) if variant.dtype == dtype]
    found = {variant: compile_variant(variant) for variant in chosen}
    assert {variant: took for variant, took in found.items() if not took.sound} == {}


def test_what_is_not_sound() -> None:
    assert Resources(64, 0, 1000, 1000).sound
    assert not Resources(64, 4, 1000, 1000).sound
    assert not Resources(64, 0, 1001, 1000).sound
