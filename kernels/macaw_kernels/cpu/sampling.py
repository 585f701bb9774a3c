"""Choosing tokens from logits on the CPU, all rows in one native call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from macaw_kernels.cpu.build import load_library

_ROW = np.dtype([("temperature", "f8"), ("top_p", "f8"), ("min_p", "f8"), ("u", "f8"), ("top_k", "i8"), ("mask", "u8")])
"""`SampleRow` of csrc/sampling.cpp."""


class Draw(NamedTuple):
    """How one row's token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: Candidates kept; 0 is off.
        top_p: Nucleus mass, above 0; 1 is off.
        min_p: Floor relative to the most likely token; 0 is off.
        u: Uniform in [0, 1): the token is where the cumulative distribution passes it.
        mask: ``[ceil(vocab / 32)]``, bit ``i % 32`` of word ``i // 32`` allows token ``i``; None allows all.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    u: float
    mask: NDArray[np.int32] | None


def choose_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Choose one token for each row.

    Args:
        logits: ``[num_rows, vocab]`` float32, contiguous.
        draws: One for each row.

    Returns:
        Token ids; -1 for a row that has NaN, or whose tokens are all ruled out.

    Raises:
        ValueError: Shapes or dtypes do not fit.
        NativeBuildError: There are no native kernels here.
    """
    num_rows, vocab = logits.shape
    if logits.dtype != torch.float32 or not logits.is_contiguous() or len(draws) != num_rows:
        raise ValueError(
            f"{len(draws)} draws from {tuple(logits.shape)} of {logits.dtype}; one each from float32, contiguous"
        )
    for draw in draws:
        if draw.mask is not None and (draw.mask.nbytes * 8 < vocab or not draw.mask.flags.c_contiguous):
            raise ValueError(f"a mask of {draw.mask.nbytes} bytes is too short for {vocab} tokens, or not contiguous")
    rows = np.array(
        [(d.temperature, d.top_p, d.min_p, d.u, d.top_k, 0 if d.mask is None else d.mask.ctypes.data) for d in draws],
        dtype=_ROW,
    )
    tokens = np.empty(num_rows, dtype=np.int64)
    load_library().macaw_sample(
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(vocab),
        ctypes.c_int64(num_rows),
        ctypes.c_void_p(rows.ctypes.data),
        ctypes.c_void_p(tokens.ctypes.data),
        ctypes.c_int32(torch.get_num_threads()),
    )
    return [int(token) for token in tokens]
