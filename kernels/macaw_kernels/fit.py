"""Fitting the planner's cost model to a device: what ``macaw kernels fit`` runs.

One layer's attention is timed with and without sharing over a grid of prefixes and batches. By the model an unshared
call costs ``base + elements * kv_element_ns``, and sharing adds ``share_us`` per item and ``state_element_ns`` per
element of the further states; the four numbers are the least squares of the relative errors, at least 0.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from macaw_kernels.attention import attend
from macaw_kernels.backends import BACKENDS, best_backend
from macaw_kernels.bench import PAGE_SIZE, Case, make_inputs, seconds
from macaw_kernels.devices import device_name
from macaw_kernels.planner import plan
from macaw_kernels.profiles import ALWAYS_SHARE, NEVER_SHARE, Fit, Fits, load_fits, save_fits
from macaw_kernels.types import AttentionPlan, DeviceProfile, HeadConfig

_SUFFIX = 64
_ROUNDS = 7


class Fitted(NamedTuple):
    """The profile, how far its model is from the measurements (median, relative), and where it was written."""

    profile: DeviceProfile
    error: float
    num_points: int
    path: Path


class _Point(NamedTuple):
    """A measurement, and what the model's coefficients multiply in it."""

    terms: tuple[float, float, float, float]
    time_ns: float


def fit_profile(device: torch.device, dtype: torch.dtype, heads: HeadConfig) -> Fitted:
    """Measure, fit and write the profile of the backend that `attend` uses for these heads.

    What was measured for other heads stays; the common profile is fitted again to all of it.
    """
    backend = best_backend(heads, device, dtype)
    points = [
        [*point.terms, point.time_ns]
        for prefix in (64, 256, 1024, 4096)
        for batch in (2, 8, 32)
        for point in _measure(device, dtype, heads, prefix, batch)
    ]
    name = device_name(device)
    built_in = BACKENDS[backend].profile(device)
    profile, error = _fitted(points, replace(built_in, name=f"{name}-{backend}-{heads.name}-fitted"))
    before = load_fits(name, backend, dtype)
    by_heads = {**(before.by_heads if before else {}), heads.name: Fit(profile, points)}
    everything = [point for fit in by_heads.values() for point in fit.points]
    common, _ = _fitted(everything, replace(built_in, name=f"{name}-{backend}-fitted"))
    return Fitted(profile, error, len(points), save_fits(Fits(by_heads, common), name, backend, dtype))


def _fitted(points: list[list[float]], template: DeviceProfile) -> tuple[DeviceProfile, float]:
    """The profile with the coefficients of these points, and the median relative error of its model."""
    table = np.array(points)
    terms, times = table[:, :-1], table[:, -1]
    # Relative errors: the short calls are where sharing may not pay.
    base, kv, share, state = _non_negative_least_squares(terms / times[:, None], np.ones(len(times)))
    error = float(np.median(np.abs(terms @ np.array([base, kv, share, state]) / times - 1)))
    return replace(template, share_us=share / 1000, kv_element_ns=kv, state_element_ns=state), error


def _measure(
    device: torch.device, dtype: torch.dtype, heads: HeadConfig, prefix: int, batch: int
) -> tuple[_Point, _Point]:
    """Time one decode step without and with sharing; alternated, so that what else runs hits both alike."""
    case = Case(heads, ((1, prefix), (batch, _SUFFIX)))
    batch_of = (case.block_tables(), [case.context] * batch, [1] * batch)
    plans = [plan(*batch_of, heads, profile, PAGE_SIZE) for profile in (NEVER_SHARE, ALWAYS_SHARE)]
    q, k_pages, v_pages = make_inputs(case, device, dtype)

    def layers(each: AttentionPlan) -> None:
        for k_layer, v_layer in zip(k_pages, v_pages, strict=True):
            attend(q, k_layer, v_layer, each, scale=1.0)

    times: tuple[list[float], list[float]] = ([], [])
    for i in range(_ROUNDS + 1):
        for each, found in zip(plans, times, strict=True):
            taken = seconds(device, partial(layers, each))
            if i:  # the first one compiles and lays out
                found.append(1e9 * taken / len(k_pages))
    states = float(batch * heads.num_q_heads * heads.v_head_dim)
    unshared, shared = (
        _Point(
            (1.0, float(each.num_kv_tokens * heads.kv_elements), len(each.shared), states * len(each.shared)),
            statistics.median(found),
        )
        for each, found in zip(plans, times, strict=True)
    )
    return unshared, shared


def _non_negative_least_squares(a: NDArray[np.float64], b: NDArray[np.float64]) -> list[float]:
    """Least squares with the coefficients that would be negative left out, one by one."""
    kept = list(range(a.shape[1]))
    while kept:
        solution = np.linalg.lstsq(a[:, kept], b, rcond=None)[0]
        if solution.min() >= 0:
            break
        kept.remove(kept[int(solution.argmin())])
    found = dict(zip(kept, solution.tolist(), strict=True)) if kept else {}
    return [found.get(i, 0.0) for i in range(a.shape[1])]
