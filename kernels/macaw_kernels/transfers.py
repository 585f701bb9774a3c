"""Copies between host and device that nobody waits for: pinned memory, ordered in the current stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def staged(array: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor on the host that ``copy_(..., non_blocking=True)`` reads without waiting for the stream.

    It may be dropped right after the copy was issued: the pinned memory is not given out again before that has run.

    Args:
        array: Any shape; on the CPU the tensor shares its memory.
        device: Where it will be copied to.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device. The host does not wait; work that is issued later does. On the CPU it is shared."""
    return staged(array, device).to(device, non_blocking=True)


class Download:
    """Tensors on their way to the host, behind the work that is issued already.

    Args:
        tensors: All on the device of the first; not to be written to before the copy has run, but by work that is
            issued later.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors[0].device.type == "cuda":
            self._tensors = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
            for host, there in zip(self._tensors, tensors, strict=True):
                host.copy_(there, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors on the host, when they are there."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._tensors
