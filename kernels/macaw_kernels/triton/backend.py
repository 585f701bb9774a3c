"""Running a plan with the Triton kernels."""

from __future__ import annotations

import triton
from torch import Tensor

from macaw_kernels.triton.attend_kernel import attend_kernel
from macaw_kernels.triton.buffers import PlanBuffers, plan_buffers
from macaw_kernels.triton.configs import TileConfig, block_dim
from macaw_kernels.triton.layout import UNIT_FIELDS
from macaw_kernels.triton.merge_kernel import merge_kernel
from macaw_kernels.triton.store_kernel import store_kernel
from macaw_kernels.types import AttentionPlan

STORE_ELEMENTS = 2048
"""Elements of K that one program of the store copies, at most."""


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
    """Run the plan into `out`; arguments as in `macaw_kernels.attend`, already checked.

    Three launches at most: items of few rows, all others, and the merge. In a captured graph they are always the same:
    see `PlanBuffers`.
    """
    buffers = plan_buffers(plan, window, q.device, q.dtype)
    if q.stride(-1) != 1:
        q = q.contiguous()
    target = out if out.stride(-1) == 1 else out.new_empty(out.shape)
    heads = plan.head_config
    phases = (
        (buffers.config.narrow, buffers.narrow, buffers.counts[0:1]),
        (buffers.config.wide, buffers.wide, buffers.counts[1:2]),
    )
    for tile, units, count in phases:
        if len(units):
            _run_units(tile, units, count, buffers, q, k_pages, v_pages, plan, target, scale, window, soft_cap, sinks)
    if buffers.num_states:
        merge_kernel[(plan.num_tokens * heads.num_q_heads,)](
            buffers.o,
            buffers.lse,
            buffers.lse if sinks is None else sinks,
            buffers.merge_starts,
            buffers.merge_states,
            target,
            target.stride(0),
            target.stride(1),
            NUM_Q_HEADS=heads.num_q_heads,
            V_HEAD_DIM=heads.v_head_dim,
            BLOCK_S=8,
            BLOCK_DV=block_dim(heads.v_head_dim),
            HAS_SINKS=sinks is not None,
            num_warps=1,
        )
    if target is not out:
        out.copy_(target)


def _run_units(
    tile: TileConfig,
    units: Tensor,
    count: Tensor,
    buffers: PlanBuffers,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: AttentionPlan,
    out: Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> None:
    heads = plan.head_config
    attend_kernel[(len(units) * heads.num_kv_heads,)](
        q,
        k_pages,
        v_pages,
        out,
        buffers.o,
        buffers.lse,
        buffers.lse if sinks is None else sinks,
        count,
        units,
        buffers.rows,
        buffers.positions,
        buffers.tables,
        scale,
        0 if window is None else window,
        0.0 if soft_cap is None else soft_cap,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        buffers.tables.stride(0),
        NUM_KV_HEADS=heads.num_kv_heads,
        GROUP_SIZE=heads.group_size,
        HEAD_DIM=heads.head_dim,
        V_HEAD_DIM=heads.v_head_dim,
        PAGE_SIZE=plan.page_size,
        UNIT_FIELDS=UNIT_FIELDS,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=block_dim(heads.head_dim),
        BLOCK_DV=block_dim(heads.v_head_dim),
        HAS_WINDOW=window is not None,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_SINKS=sinks is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def store_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    """Write keys and values into their slots; arguments as in `macaw_kernels.store_kv`.

    A slot outside of the pages is not written: a device cannot raise.
    """
    if not len(slot_mapping):
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    num_kv_heads, head_dim, v_head_dim = k.shape[1], k.shape[2], v.shape[2]
    block_d, block_dv = block_dim(head_dim), block_dim(v_head_dim)
    block_h = min(triton.next_power_of_2(num_kv_heads), max(1, STORE_ELEMENTS // max(block_d, block_dv)))
    store_kernel[(len(slot_mapping), triton.cdiv(num_kv_heads, block_h))](
        k,
        v,
        k_pages,
        v_pages,
        slot_mapping,
        k_pages.shape[0] * k_pages.shape[1],
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
    )
