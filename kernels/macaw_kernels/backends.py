"""The backends of `attend`, best first, and which of them takes what."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from macaw_kernels import torch_backend
from macaw_kernels.cpu import attention as native
from macaw_kernels.cpu.build import NativeBuildError
from macaw_kernels.profiles import CPU_NATIVE, CPU_TORCH
from macaw_kernels.types import DeviceProfile, HeadConfig

log = logging.getLogger(__name__)


class Backend(NamedTuple):
    """One way to run a plan.

    Attributes:
        supports: Whether it takes these heads, on this device, with this dtype of queries, keys and values. Only asked
            for what `attend` takes.
        attend: As `macaw_kernels.attend`, with checked arguments and an `out`.
        profile: What its costs are: the planner's default.
    """

    supports: Callable[[HeadConfig, torch.device, torch.dtype], bool]
    attend: Callable[..., None]
    profile: DeviceProfile


def _native_supports(heads: HeadConfig, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and native.supports(heads, dtype, dtype) and native_available()


BACKENDS = {
    "native": Backend(_native_supports, native.attend, CPU_NATIVE),
    "torch": Backend(lambda heads, device, dtype: True, torch_backend.attend, CPU_TORCH),
}


@cache
def native_available() -> bool:
    """Whether there are native CPU kernels; built at the first call, and said once if they cannot be."""
    try:
        native.library()
    except NativeBuildError as e:
        log.warning("the CPU runs on plain torch, several times slower: no native kernels. %s", e)
        return False
    return True


def best_backend(heads: HeadConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the backend that `attend` uses for these heads."""
    return next(name for name, backend in BACKENDS.items() if backend.supports(heads, device, dtype))


def default_profile(device: torch.device, dtype: torch.dtype) -> DeviceProfile:
    """Return the cost model of the backend that `attend` uses for heads of common sizes."""
    return BACKENDS[best_backend(HeadConfig(1, 1, 64, 64), device, dtype)].profile
