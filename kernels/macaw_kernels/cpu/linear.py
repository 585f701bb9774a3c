"""Linear layers over packed weights in float32, bfloat16 or int8."""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch import Tensor

from macaw_kernels.cpu.build import load_library

WeightType = Literal["float32", "bfloat16", "int8"]

_TYPES: dict[WeightType, tuple[int, torch.dtype]] = {
    "float32": (0, torch.float32),
    "bfloat16": (1, torch.bfloat16),
    "int8": (2, torch.int8),
}


class PackedMatrixStruct(ctypes.Structure):
    """`PackedMatrix` of csrc/linear.h."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class PackedLinear:
    """``y = x @ weight.T + bias``, the weight packed once in the order in which it will be read.

    int8 is symmetric, one scale per output channel; activations stay float32.

    Args:
        weight: ``[n, k]``, float32 or bfloat16; k even. It is copied.
        bias: ``[n]`` or None.
        weight_type: What to pack.

    Raises:
        ValueError: Shapes or dtypes that the kernels do not take.
        NativeBuildError: There are no native kernels here.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, weight_type: WeightType) -> None:
        if weight.dim() != 2 or weight.shape[1] % 2 or weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"weight is {tuple(weight.shape)} of {weight.dtype}; [n, k] with k even, float32 or bfloat16"
            )
        library = load_library()
        code, dtype = _TYPES[weight_type]
        self.n, self.k = weight.shape
        panel = library.macaw_panel()
        padded = -(-self.n // panel) * panel
        weight = weight.detach().contiguous()
        self._panels = torch.empty(padded * self.k, dtype=dtype)
        self._scales = torch.empty(padded if weight_type == "int8" else 0, dtype=torch.float32)
        self._bias = None
        if bias is not None:
            self._bias = torch.zeros(padded, dtype=torch.float32)
            self._bias[: self.n] = bias.detach()
        library.macaw_pack(
            ctypes.c_int32(weight.dtype == torch.bfloat16),
            ctypes.c_void_p(weight.data_ptr()),
            ctypes.c_int32(code),
            ctypes.c_int64(self.n),
            ctypes.c_int64(self.k),
            ctypes.c_void_p(self._panels.data_ptr()),
            ctypes.c_void_p(self._scales.data_ptr()),
        )
        self.struct = PackedMatrixStruct(
            type=code,
            n=self.n,
            k=self.k,
            panels=self._panels.data_ptr(),
            scales=self._scales.data_ptr() if weight_type == "int8" else None,
            bias=None if self._bias is None else self._bias.data_ptr(),
        )

    @property
    def num_bytes(self) -> int:
        """Of the weights, as they are read from memory at each step."""
        return self._panels.numel() * self._panels.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``[..., n]`` float32 for `x` ``[..., k]`` of any floating dtype.

        bfloat16 by bfloat16 is multiplied as it is; everything else is multiplied as float32.
        """
        if x.shape[-1] != self.k:
            raise ValueError(f"input has {x.shape[-1]} features, the weight {self.k}")
        as_bf16 = x.dtype == torch.bfloat16 == self._panels.dtype
        rows = x.detach().to(torch.bfloat16 if as_bf16 else torch.float32).reshape(-1, self.k).contiguous()
        y = torch.empty(*x.shape[:-1], self.n, dtype=torch.float32)
        load_library().macaw_linear(
            ctypes.byref(self.struct),
            ctypes.c_int32(as_bf16),
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_int64(self.k),
            ctypes.c_int64(len(rows)),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_int64(self.n),
            ctypes.c_int32(torch.get_num_threads()),
        )
        return y
