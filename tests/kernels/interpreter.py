"""Triton 3.6's interpreter, made fit for these tests; import it after ``TRITON_INTERPRET=1`` is set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_builder = interpreter.InterpreterBuilder
_patch_tensor, _cast, _dot = interpreter._patch_lang_tensor, _builder.cast_impl, _builder.create_dot
_patched: set[str] = set()


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """NumPy 2.4 makes no scalar of an array of one element (triton issue 9171)."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function called from a kernel looks the whole language over in each call: once per module will do."""
    if self.fn.__module__ not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


def _as_float(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
    """Products of bfloat16: they are kept as integers, and would be multiplied as such."""
    return _dot(self, _as_float(a), _as_float(b), *others)


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    """To bfloat16 by rounding, as devices do, not by cutting off."""
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(bits.view(np.uint16), tl.bfloat16)
    return _cast(self, src, dst_type)


def install() -> None:
    """Replace what is wrong or slow."""
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter.InterpretedFunction.__call__ = _call
    _builder.create_dot = _create_dot
    _builder.cast_impl = _cast_impl
