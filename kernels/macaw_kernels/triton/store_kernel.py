"""The KV store: scatter a step's keys and values into their pages."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_kernel(
    p_k,
    p_v,
    p_k_pages,
    p_v_pages,
    p_slots,
    num_slots,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Copy `BLOCK_H` heads of token ``program 0``: ``pages[slots[token]] = new[token]``.

    Args:
        p_k: ``[num_tokens, NUM_KV_HEADS, HEAD_DIM]``, last axis dense.
        p_v: ``[num_tokens, NUM_KV_HEADS, V_HEAD_DIM]``, last axis dense.
        p_k_pages: ``[num_slots, NUM_KV_HEADS, HEAD_DIM]``, dense.
        p_v_pages: ``[num_slots, NUM_KV_HEADS, V_HEAD_DIM]``, dense.
        p_slots: ``[num_tokens]`` int64; a slot outside of the pages is not written.
        num_slots: Slots of all pages.
        stride_k_token: Elements from one token of `p_k` to the next; the other strides likewise.
        stride_k_head: Of `p_k`.
        stride_v_token: Of `p_v`.
        stride_v_head: Of `p_v`.
    """
    i_token = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + i_token).to(tl.int64)
    if (slot < 0) | (slot >= num_slots):
        return
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_k = (o_h < NUM_KV_HEADS)[:, None] & (o_d < HEAD_DIM)[None, :]
    m_v = (o_h < NUM_KV_HEADS)[:, None] & (o_dv < V_HEAD_DIM)[None, :]
    # [BLOCK_H, BLOCK_D] and [BLOCK_H, BLOCK_DV]
    b_k = tl.load(p_k + i_token * stride_k_token + o_h[:, None] * stride_k_head + o_d[None, :], mask=m_k)
    b_v = tl.load(p_v + i_token * stride_v_token + o_h[:, None] * stride_v_head + o_dv[None, :], mask=m_v)
    b_row = slot * NUM_KV_HEADS + o_h
    tl.store(p_k_pages + b_row[:, None] * HEAD_DIM + o_d[None, :], b_k, mask=m_k)
    tl.store(p_v_pages + b_row[:, None] * V_HEAD_DIM + o_dv[None, :], b_v, mask=m_v)
