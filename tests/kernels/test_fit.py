"""Profiles in files: measured, kept, read, and refused where they are damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from macaw_kernels import BACKENDS, HeadConfig, bench, best_backend, default_profile, fit
from macaw_kernels.check import check_backends
from macaw_kernels.devices import device_name
from macaw_kernels.profiles import CPU_TORCH, Fits, gpu_profile, load_profile, profile_file, save_fits

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACAW_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
def test_a_fitted_profile_is_the_default_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_ROUNDS", 1)
    monkeypatch.setattr(bench, "_LAYER_BYTES", 1 << 20)
    backend = best_backend(HeadConfig(1, 1, 64, 64), CPU, torch.float32)
    assert default_profile(CPU, torch.float32) == BACKENDS[backend].profile(CPU)
    fitted = fit.fit_profile(CPU, torch.float32, HeadConfig(2, 1, 64, 64))
    assert fitted.num_points == 24
    assert fitted.profile.kv_element_ns > 0
    common = default_profile(CPU, torch.float32)
    assert replace(common, name=fitted.profile.name) == fitted.profile
    assert default_profile(CPU, torch.bfloat16) == BACKENDS[backend].profile(CPU)


def test_other_heads_add_to_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_device: object, _dtype: object, heads: HeadConfig, prefix: int, batch: int) -> list[fit._Point]:
        """A device on which each element costs as many nanoseconds as there are query heads, and sharing 1 us."""
        tokens, shares = float(prefix * batch * heads.kv_elements), float(batch)
        return [fit._Point((1.0, tokens, shares, 0.0), 50.0 + heads.num_q_heads * tokens + 1000 * shares)]

    monkeypatch.setattr(fit, "_measure", measure)
    small, large, other = (HeadConfig(n, 2, 64, 64) for n in (2, 8, 4))
    first = fit.fit_profile(CPU, torch.float32, small)
    assert first.profile.kv_element_ns == pytest.approx(2)
    assert first.profile.share_us == pytest.approx(1)
    second = fit.fit_profile(CPU, torch.float32, large)
    assert (second.path, second.num_points) == (first.path, 12)
    assert default_profile(CPU, torch.float32, heads=small) == first.profile
    assert default_profile(CPU, torch.float32, heads=large) == second.profile
    common = default_profile(CPU, torch.float32, heads=other)
    assert common == default_profile(CPU, torch.float32)
    assert 2 < common.kv_element_ns < 8
    again = fit.fit_profile(CPU, torch.float32, small)
    assert again.profile == first.profile
    assert default_profile(CPU, torch.float32, heads=large) == second.profile


def test_least_squares_leaves_negative_coefficients_out() -> None:
    a = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 2.5], [1.0, 2.0, 4.0], [1.0, 3.0, 4.0]], dtype=torch.float64).numpy()
    exact = fit._non_negative_least_squares(a, a @ [2.0, 3.0, 1.0])
    assert exact == pytest.approx([2.0, 3.0, 1.0])
    clipped = fit._non_negative_least_squares(a, a @ [2.0, 3.0, -1.0])
    assert min(clipped) >= 0
    assert clipped[2] == 0


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"by_heads": [], "common": {}}', '{"by_heads": {}, "common": {"name": "x", "share_us": -1}}'],
)
def test_a_damaged_file_is_said_and_not_used(content: str, caplog: pytest.LogCaptureFixture) -> None:
    path = save_fits(Fits({}, CPU_TORCH), "a-device", "torch", torch.float32)
    assert load_profile("a-device", "torch", torch.float32) == CPU_TORCH
    path.write_text(content)
    assert load_profile("a-device", "torch", torch.float32) is None
    assert "macaw kernels fit" in caplog.text


def test_files_by_device_backend_and_dtype() -> None:
    assert device_name(CPU) in profile_file(device_name(CPU), "torch", torch.bfloat16).name
    assert load_profile("a-device", "torch", torch.float32) is None


def test_estimates_for_gpus_follow_their_bandwidth() -> None:
    assert gpu_profile("nvidia-h200").kv_element_ns < gpu_profile("nvidia-a100-sxm4").kv_element_ns
    assert gpu_profile("nvidia-a100-sxm4").kv_element_ns < gpu_profile("something-else").kv_element_ns


@pytest.mark.slow
def test_every_backend_passes_the_check() -> None:
    results = list(check_backends(CPU))
    assert {result.backend for result in results} >= {"torch"}
    assert [result for result in results if not result.passed] == []
