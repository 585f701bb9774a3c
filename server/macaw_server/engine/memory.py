"""How many KV pages fit: device, dtype and memory are decided here, before anything is allocated."""

from __future__ import annotations

import math
from typing import NamedTuple

import psutil
import torch

from macaw_server.config import EngineConfig
from macaw_server.errors import ConfigError, MemoryBudgetError

_MIN_CONTEXT = 256
"""Contexts that nobody asked for are lowered to fit the pool, but not below this many tokens."""
_GPU_SHARE, _CPU_SHARE = 0.9, 0.5
"""Share of the free memory that the KV pool takes when `--kv-memory` is not given (after the weights)."""


class PoolSize(NamedTuple):
    """The KV pool's size, and the context that is served with it.

    Attributes:
        num_pages: Pages in the pool.
        max_model_len: In tokens; lowered to what the pool holds when nobody asked for a length.
    """

    num_pages: int
    max_model_len: int


def choose_device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: Not a device, or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"{name!r} is not a device. Accepted: auto, cpu, cuda, cuda:N.") from e
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"Device {name} is not supported. Accepted: auto, cpu, cuda, cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"Device {name} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs. "
            "Use --device cpu, or install a CUDA build of torch."
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def choose_dtype(name: str, device: torch.device, *, native: bool) -> torch.dtype:
    """The dtype for ``auto`` or an explicit name.

    Args:
        name: ``auto`` is bfloat16 where it is fast, else float32.
        device: Where the model will be.
        native: The native CPU decoder will run it: that reads bfloat16 fast on any processor.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else native or fast_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def fast_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions; without them torch multiplies hundreds of times slower."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def size_pool(config: EngineConfig, *, page_bytes: int, max_model_len: int, device: torch.device) -> PoolSize:
    """Decide the size of the KV pool.

    Args:
        config: `kv_memory` wins; else a share of what is free, but no more than a full batch of full contexts.
        page_bytes: Bytes of one page over all layers.
        max_model_len: Context in tokens.
        device: Where the pool will be.

    Raises:
        MemoryBudgetError: The pool is over the free memory, or holds less than the context that was asked for.
    """
    # Ranks on the CPU share its memory; a GPU has one rank.
    free = free_memory(device) // (config.tensor_parallel_size if device.type == "cpu" else 1)
    context_pages = -(-max_model_len // config.page_size)
    if config.kv_memory is None:
        share = _GPU_SHARE if device.type == "cuda" else _CPU_SHARE
        pages = min(int(free * share) // config.engines // page_bytes, config.max_num_seqs * context_pages)
    elif config.kv_memory // config.engines > free:
        raise MemoryBudgetError(
            f"--kv-memory {_size(config.kv_memory)} is over the {_size(free)} that are free on {device}. "
            "Give less, or free some."
        )
    else:
        pages = config.kv_memory // config.engines // page_bytes
    if pages >= context_pages:
        return PoolSize(pages, max_model_len)
    if config.max_model_len is None and pages * config.page_size >= _MIN_CONTEXT:
        return PoolSize(pages, pages * config.page_size)
    least = context_pages * page_bytes * config.engines
    raise MemoryBudgetError(
        f"{_size(pages * page_bytes)} for the KV pool hold {pages * config.page_size:,} tokens, fewer than the "
        f"context of {max_model_len:,}. Give --kv-memory of at least {_size(least)}, or a "
        "smaller --max-model-len."
    )


def _size(num_bytes: int) -> str:
    """Rounded up, so that a size that a message asks for is enough."""
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{math.ceil(num_bytes / unit * 100) / 100:.2f}{name}"
