"""The backends of `attend`, best first, and which of them takes what."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from macaw_kernels import torch_backend
from macaw_kernels.cpu import attention as native
from macaw_kernels.cpu.build import NativeBuildError
from macaw_kernels.devices import device_name
from macaw_kernels.profiles import CPU_NATIVE, CPU_TORCH, gpu_profile, load_profile
from macaw_kernels.triton import configs as triton_configs
from macaw_kernels.types import DeviceProfile, HeadConfig

log = logging.getLogger(__name__)


class Backend(NamedTuple):
    """One way to run a plan.

    Attributes:
        supports: Whether it takes these heads, on this device, with this dtype of queries, keys and values. Only asked
            for what `attend` takes.
        attend: As `macaw_kernels.attend`, with checked arguments and an `out`.
        profile: What its costs are on this device, unless measured: the planner's default.
    """

    supports: Callable[[HeadConfig, torch.device, torch.dtype], bool]
    attend: Callable[..., None]
    profile: Callable[[torch.device], DeviceProfile]


def _native_supports(heads: HeadConfig, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and native.supports(heads, dtype, dtype) and native_available()


def _triton_supports(heads: HeadConfig, device: torch.device, dtype: torch.dtype) -> bool:
    on_device = device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return on_device and triton_configs.supports(heads) and triton_available()


def _triton_attend(*args: Any, **options: Any) -> None:
    from macaw_kernels.triton import backend  # imports Triton

    backend.attend(*args, **options)


BACKENDS = {
    "triton": Backend(_triton_supports, _triton_attend, lambda device: gpu_profile(device_name(device))),
    "native": Backend(_native_supports, native.attend, lambda device: CPU_NATIVE),
    "torch": Backend(lambda heads, device, dtype: True, torch_backend.attend, lambda device: CPU_TORCH),
}


@cache
def triton_available() -> bool:
    """Whether Triton is installed; said once if it is not."""
    if find_spec("triton") is None:
        log.warning("GPU attention runs on plain torch, many times slower: Triton is missing; pip install 'macaw[gpu]'")
        return False
    return True


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


def default_profile(
    device: torch.device, dtype: torch.dtype, backend: str | None = None, heads: HeadConfig | None = None
) -> DeviceProfile:
    """Return a backend's cost model: what ``macaw kernels fit`` has measured on this device, else built in.

    Args:
        device: Where it runs.
        dtype: Of keys and values.
        backend: A name of `BACKENDS`; None is the one that `attend` uses for these heads.
        heads: Whose costs; None is heads of common sizes.
    """
    backend = backend or best_backend(heads or HeadConfig(1, 1, 64, 64), device, dtype)
    return load_profile(device_name(device), backend, dtype, heads) or BACKENDS[backend].profile(device)
