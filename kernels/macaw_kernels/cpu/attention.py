"""The native two-phase attention: the library's interface, and what a plan looks like to it."""

from __future__ import annotations

import ctypes
import threading
import weakref
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache

import numpy as np
import torch
from torch import Tensor

from macaw_kernels.cpu.build import load_library
from macaw_kernels.types import AttentionPlan, HeadConfig, IntArray

MAX_HEAD_DIM = 256
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ALIGNMENT = 64
_COUNTER_BYTES = 256


class AttentionArgs(ctypes.Structure):
    """``macaw::AttentionArgs`` of ``csrc/attention.h``, field by field."""

    _fields_ = (
        ("q", c_void_p),
        ("k_pages", c_void_p),
        ("v_pages", c_void_p),
        ("out", c_void_p),
        ("q_row_stride", c_int64),
        ("q_head_stride", c_int64),
        ("out_row_stride", c_int64),
        ("out_head_stride", c_int64),
        ("sinks", c_void_p),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("window", c_int64),
        ("q_dtype", c_int32),
        ("kv_dtype", c_int32),
        ("num_q_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("v_head_dim", c_int32),
        ("page_size", c_int32),
        ("num_tokens", c_int64),
        ("batch", c_int64),
        ("table_width", c_int64),
        ("num_shared", c_int64),
        ("positions", c_void_p),
        ("block_tables", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("own_starts", c_void_p),
        ("shared_table", c_void_p),
        ("shared_start", c_void_p),
        ("shared_len", c_void_p),
        ("shared_row_starts", c_void_p),
        ("shared_rows", c_void_p),
        ("schedule", c_void_p),
        ("workspace", c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """Return the library with the types of its attention functions declared.

    Raises:
        NativeBuildError: There is none on this machine.
    """
    lib = load_library()
    args = POINTER(AttentionArgs)
    lib.macaw_attend.argtypes, lib.macaw_attend.restype = [args, c_int32], None
    lib.macaw_attention_schedule.argtypes, lib.macaw_attention_schedule.restype = [args, c_int32], c_void_p
    lib.macaw_attention_schedule_free.argtypes, lib.macaw_attention_schedule_free.restype = [c_void_p], None
    lib.macaw_attention_workspace.argtypes, lib.macaw_attention_workspace.restype = [args, c_int32], c_int64
    return lib


def supports(heads: HeadConfig, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
    """Whether `attend` takes these heads and dtypes (any mixture of float32 and bfloat16)."""
    return max(heads.head_dim, heads.v_head_dim) <= MAX_HEAD_DIM and q_dtype in DTYPES and kv_dtype in DTYPES


class PlanArguments:
    """A plan as the native kernels read it, for layers with one window.

    Attributes:
        args: The plan's part is filled in, the schedule too; copy it, add a layer's part and a workspace.
        workspace_bytes: What a layer with these heads needs for `num_threads` threads.
    """

    def __init__(self, plan: AttentionPlan, window: int | None, num_threads: int) -> None:
        lib, heads = library(), plan.head_config
        shared = plan.shared
        row_starts = np.zeros(len(shared) + 1, dtype=np.int64)
        np.cumsum([len(item.rows) for item in shared], out=row_starts[1:])
        arrays = {
            "positions": plan.positions,
            "block_tables": plan.block_tables,
            "query_starts": plan.query_starts,
            "context_lens": plan.context_lens,
            "own_starts": plan.own_starts,
            "shared_table": [item.sequence for item in shared],
            "shared_start": [item.kv_start for item in shared],
            "shared_len": [item.kv_len for item in shared],
            "shared_row_starts": row_starts,
            "shared_rows": np.concatenate([item.rows for item in shared]) if shared else [],
        }
        self._arrays: dict[str, IntArray] = {
            name: np.ascontiguousarray(array, dtype=np.int64) for name, array in arrays.items()
        }
        self.args = AttentionArgs(
            window=window or 0,
            num_q_heads=heads.num_q_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            v_head_dim=heads.v_head_dim,
            page_size=plan.page_size,
            num_tokens=plan.num_tokens,
            batch=len(plan.context_lens),
            table_width=plan.block_tables.shape[1],
            num_shared=len(shared),
            **{name: array.ctypes.data for name, array in self._arrays.items()},
        )
        schedule = lib.macaw_attention_schedule(byref(self.args), num_threads)
        weakref.finalize(self, lib.macaw_attention_schedule_free, schedule)
        self.args.schedule = schedule
        self.workspace_bytes = int(lib.macaw_attention_workspace(byref(self.args), num_threads))


def plan_arguments(plan: AttentionPlan, window: int | None, num_threads: int) -> PlanArguments:
    """Return the plan for the native kernels, made once for all layers with this window."""
    if window is not None and window > plan.positions.max(initial=0):
        window = None  # hides nothing
    key = ("native", window, num_threads)
    made: PlanArguments | None = plan.cache.get(key)
    if made is None:
        made = plan.cache[key] = PlanArguments(plan, window, num_threads)
    return made


class Workspace(threading.local):
    """Memory of the native kernels, grown as needed: one per thread that calls them."""

    def __init__(self) -> None:
        self._memory = torch.zeros(0, dtype=torch.uint8)
        self._address = 0
        self._size = 0

    def address(self, num_bytes: int) -> int:
        """Return the address of at least so many bytes, for the attention of one layer at a time."""
        if num_bytes > self._size:
            self._size = num_bytes + num_bytes // 4
            self._memory = torch.empty(self._size + _ALIGNMENT, dtype=torch.uint8)
            offset = -self._memory.data_ptr() % _ALIGNMENT
            self._memory[offset : offset + _COUNTER_BYTES] = 0
            self._address = self._memory.data_ptr() + offset
        return self._address


_workspace = Workspace()


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: AttentionPlan,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> None:
    """Run the plan into `out`; arguments as in `macaw_kernels.attend`, already checked and supported."""
    num_threads = torch.get_num_threads()
    of_plan = plan_arguments(plan, window, num_threads)
    if q.stride(2) != 1:
        q = q.contiguous()
    if sinks is not None:
        sinks = sinks.detach().float().contiguous()
    to = out if out.stride(2) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    args = AttentionArgs.from_buffer_copy(of_plan.args)
    args.q, args.k_pages, args.v_pages, args.out = q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), to.data_ptr()
    args.q_row_stride, args.q_head_stride, _ = q.stride()
    args.out_row_stride, args.out_head_stride, _ = to.stride()
    args.sinks = None if sinks is None else sinks.data_ptr()
    args.scale, args.soft_cap = scale, soft_cap or 0.0
    args.q_dtype, args.kv_dtype = DTYPES[q.dtype], DTYPES[k_pages.dtype]
    args.workspace = _workspace.address(of_plan.workspace_bytes)
    library().macaw_attend(byref(args), num_threads)
    if to is not out:
        out.copy_(to)
