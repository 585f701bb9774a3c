"""Tile shapes for a device, measured: what ``macaw kernels fit --tiles`` runs. Never while serving.

The search goes over one thing at a time, from the built-in values: the tile of the narrow phase, that of the wide one,
then how far long ranges are split. Tiles that spill or do not fit the shared memory are not timed; something else than
what is there has to be faster beyond noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from macaw_kernels.attention import attend
from macaw_kernels.backends import default_profile
from macaw_kernels.bench import PAGE_SIZE, TOLERANCE, Case, gpu_cases, make_inputs, seconds
from macaw_kernels.devices import device_name
from macaw_kernels.planner import plan
from macaw_kernels.triton.configs import KernelConfig, TileConfig, architecture, built_in, save_config
from macaw_kernels.types import AttentionPlan, HeadConfig

GAIN = 0.98
"""What is to replace the best so far takes at most this part of its time."""
_ROUNDS = 5
_BLOCK_M = {"narrow": (16,), "wide": (32, 64, 128)}
_BLOCK_N = (16, 32, 64, 128)
_WARPS = (2, 4, 8)
_STAGES = (1, 2, 3, 4)
_PROGRAMS_PER_SM = (2, 4, 8)
_MIN_SPLIT = (128, 256, 512)

Timer = Callable[[KernelConfig], float]
"""How long a configuration takes, in any unit; infinite where it does not run or is wrong."""
IsSound = Callable[[str, TileConfig], bool]
"""Whether a tile of a phase, "narrow" or "wide", compiles without spills and fits the shared memory."""


class Tuned(NamedTuple):
    """What a search has found.

    Attributes:
        config: The best.
        gain: Time of what it started from, over its own.
        num_timed: Configurations that were timed.
        path: Where it was written.
    """

    config: KernelConfig
    gain: float
    num_timed: int
    path: Path


def tune(heads: HeadConfig, device: torch.device, dtype: torch.dtype) -> Tuned:
    """Search on the bench's cases with these head dims and write the result to the device's file."""
    head_dim = max(heads.head_dim, heads.v_head_dim)
    arch = architecture(device)
    timer = CaseTimer([_with_dims(case, heads) for case in gpu_cases()], device, dtype)
    config, gain, num_timed = search(built_in(arch, head_dim, dtype), timer, compiled_sound(arch, head_dim, dtype))
    return Tuned(config, gain, num_timed, save_config(device_name(device), head_dim, dtype, config))


def search(start: KernelConfig, timer: Timer, is_sound: IsSound) -> tuple[KernelConfig, float, int]:
    """The best configuration, the gain over `start`, and how many were timed.

    Raises:
        RuntimeError: `start` itself does not run.
    """
    first = least = timer(start)
    if not math.isfinite(first):
        raise RuntimeError(f"the built-in configuration does not run here, or is wrong: {start}")
    best, num_timed = start, 1
    for variants in (
        partial(_tiles, "narrow", is_sound),
        partial(_tiles, "wide", is_sound),
        _splits,
    ):
        for config in variants(best):
            num_timed += 1
            if (taken := timer(config)) <= GAIN * least:
                best, least = config, taken
    return best, first / least, num_timed


def _tiles(phase: str, is_sound: IsSound, base: KernelConfig) -> Iterator[KernelConfig]:
    current: TileConfig = getattr(base, phase)
    for shape in product(_BLOCK_M[phase], _BLOCK_N, _WARPS, _STAGES):
        tile = TileConfig(*shape)
        if tile != current and is_sound(phase, tile):
            yield KernelConfig(
                tile if phase == "narrow" else base.narrow,
                tile if phase == "wide" else base.wide,
                base.programs_per_sm,
                base.min_split,
            )


def _splits(base: KernelConfig) -> Iterator[KernelConfig]:
    for programs_per_sm, min_split in product(_PROGRAMS_PER_SM, _MIN_SPLIT):
        config = KernelConfig(base.narrow, base.wide, programs_per_sm, min_split)
        if config != base:
            yield config


def compiled_sound(arch: str, head_dim: int, dtype: torch.dtype) -> IsSound:
    """Find out by compiling, which needs no GPU: without features, and with all of them."""
    from triton.errors import TritonError

    from macaw_kernels.triton.compile import DTYPES, FEATURES, Variant, compile_variant

    name = next(name for name, each in DTYPES.items() if each == dtype)

    def is_sound(phase: str, tile: TileConfig) -> bool:
        try:
            return all(
                compile_variant(Variant(arch, phase, name, head_dim, features), tile).sound
                for features in (FEATURES[0], FEATURES[-1])
            )
        except (TritonError, RuntimeError):  # the compiler does not take it
            return False

    return is_sound


class CaseTimer:
    """Times configurations on cases; a result is the geometric mean of the times over those of the first one.

    Args:
        cases: Decode steps, planned as this device's profile decides.
        device: Where to run.
        dtype: Of queries, keys and values.
    """

    def __init__(self, cases: list[Case], device: torch.device, dtype: torch.dtype) -> None:
        self._cases, self._device, self._dtype = cases, device, dtype
        self._expected: dict[Case, Tensor] = {}
        self._first: dict[Case, float] = {}

    def __call__(self, config: KernelConfig) -> float:
        """See `Timer`."""
        logs = []
        for case in self._cases:
            taken = self._time(case, config)
            logs.append(math.log(taken / self._first.setdefault(case, taken)) if math.isfinite(taken) else math.inf)
        return math.exp(statistics.fmean(logs))

    def _time(self, case: Case, config: KernelConfig) -> float:
        from triton.runtime.errors import OutOfResources

        from macaw_kernels.triton.buffers import plan_buffers

        heads, batch = case.heads, case.batch
        profile = default_profile(self._device, self._dtype, "triton", heads)
        of_case = plan(case.block_tables(), [case.context] * batch, [1] * batch, heads, profile, PAGE_SIZE)
        plan_buffers(of_case, None, self._device, self._dtype, config.for_group(heads.group_size))
        torch.manual_seed(0)  # the same inputs for each configuration
        q, k_pages, v_pages = make_inputs(case, self._device, self._dtype)
        run = partial(_layers, q, k_pages, v_pages, of_case)
        try:
            answer = run()  # compiles
            expected = self._expected.setdefault(case, answer)
            if not (answer.float() - expected.float()).abs().max().item() <= TOLERANCE[self._dtype]:
                return math.inf
            return statistics.median(seconds(self._device, run) for _ in range(_ROUNDS))
        except OutOfResources:
            return math.inf


def _layers(q: Tensor, k_pages: Tensor, v_pages: Tensor, of_case: AttentionPlan) -> Tensor:
    scale = q.shape[-1] ** -0.5
    for k_layer, v_layer in zip(k_pages, v_pages, strict=True):
        out = attend(q, k_layer, v_layer, of_case, scale=scale, backend="triton")
    return out


def _with_dims(case: Case, heads: HeadConfig) -> Case:
    return replace(case, heads=replace(case.heads, head_dim=heads.head_dim, v_head_dim=heads.v_head_dim))
