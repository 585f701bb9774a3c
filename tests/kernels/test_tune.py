"""The search for tile shapes: what it tries, what it keeps, and where that ends up. Times are made up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

from macaw_kernels.triton import configs, tune
from macaw_kernels.triton.configs import KernelConfig, TileConfig, built_in, config_file, config_key, save_config

START = built_in("sm_90", 128, torch.bfloat16)
BEST = KernelConfig(TileConfig(16, 128, 2, 4), TileConfig(128, 64, 8, 2), 8, 512)


def distance(config: KernelConfig) -> float:
    """A time that is least at `BEST`, each part counting by itself."""
    numbers = [
        [*astuple(each.narrow), *astuple(each.wide), each.programs_per_sm, each.min_split] for each in (config, BEST)
    ]
    return 1.0 + sum(abs(math.log2(a / b)) for a, b in zip(*numbers, strict=True))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MACAW_CACHE_DIR", str(tmp_path))
    configs._measured.cache_clear()
    yield
    configs._measured.cache_clear()


def test_the_best_is_found_and_nothing_is_timed_twice() -> None:
    timed: list[KernelConfig] = []

    def timer(config: KernelConfig) -> float:
        timed.append(config)
        return distance(config)

    config, gain, num_timed = tune.search(START, timer, lambda phase, tile: True)
    assert config == BEST
    assert gain == pytest.approx(distance(START))
    assert num_timed == len(timed) == len(set(timed))


def test_what_does_not_compile_is_not_timed() -> None:
    def timer(config: KernelConfig) -> float:
        assert config.wide.block_m <= 64
        assert config.narrow.num_warps > 2
        return distance(config)

    def is_sound(phase: str, tile: TileConfig) -> bool:
        return tile.block_m <= 64 if phase == "wide" else tile.num_warps > 2

    config, _, _ = tune.search(START, timer, is_sound)
    assert (config.narrow, config.wide) == (TileConfig(16, 128, 4, 4), TileConfig(64, 64, 8, 2))


def test_noise_and_failures_replace_nothing() -> None:
    assert tune.search(START, lambda config: 1.0 if config == START else 0.99, lambda *_: True)[0] == START
    assert tune.search(START, lambda config: 1.0 if config == START else math.inf, lambda *_: True)[:2] == (START, 1.0)
    with pytest.raises(RuntimeError, match="built-in configuration does not run here"):
        tune.search(START, lambda config: math.inf, lambda *_: True)


def test_the_file_keeps_other_entries_and_is_what_the_kernels_read() -> None:
    save_config("a-gpu", 64, torch.float16, START)
    path = save_config("a-gpu", 128, torch.bfloat16, BEST)
    assert path == config_file("a-gpu")
    assert configs._measured("a-gpu") == {
        config_key(64, torch.float16): START,
        config_key(128, torch.bfloat16): BEST,
    }


@pytest.mark.slow
def test_soundness_is_the_compilers_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    is_sound = tune.compiled_sound("sm_90", 128, torch.bfloat16)
    assert is_sound("narrow", START.narrow)
    assert not is_sound("wide", TileConfig(128, 128, 4, 8)), "more than its shared memory"
