"""Both phases of attention: query rows of one KV head against a run of pages. One program is one unit and KV head.

The rows of a unit's tokens times the query heads of the KV head are the M axis of a matrix product, so that a group of
query heads, a group of sequences or a chunk of a prefill all become one tile. With scores s_j = q . k_j * scale, capped
and masked, the program computes the attention state over its keys (online softmax, Milakov & Gimelshein 2018; split
over the keys as in Dao et al., Flash-Decoding, 2023):

    lse = log(sum_j exp(s_j)),  o = sum_j exp(s_j - lse) v_j

A unit that is all there is for its rows writes the result; others write states, which `merge_kernel` joins.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _step(
    b_o,
    b_max,
    b_sum,
    b_q,
    b_position,
    start,
    kv_stop,
    i_kv_head,
    p_k,
    p_v,
    p_table,
    scale,
    window,
    soft_cap,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take the keys from `start` on into the state; only a `MASKED` step may reach beyond what all rows see."""
    LOG2E: tl.constexpr = 1.4426950408889634
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    b_key = start + tl.arange(0, BLOCK_N)
    # [BLOCK_N]; keys beyond the end may lie on no page: they read none.
    if MASKED:
        m_key = b_key < kv_stop
        b_page = tl.load(p_table + b_key // PAGE_SIZE, mask=m_key, other=0)
    else:
        m_key = b_key >= 0
        b_page = tl.load(p_table + b_key // PAGE_SIZE)
    b_slot = b_page.to(tl.int64) * PAGE_SIZE + b_key % PAGE_SIZE
    b_row = b_slot * NUM_KV_HEADS + i_kv_head
    m_k = (o_d < HEAD_DIM)[None, :]
    m_v = (o_dv < V_HEAD_DIM)[None, :]
    p_k_block = p_k + b_row[:, None] * HEAD_DIM + o_d[None, :]
    p_v_block = p_v + b_row[:, None] * V_HEAD_DIM + o_dv[None, :]
    # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]; slots that nobody has written may hold NaN: 0 * NaN is not 0.
    if MASKED:
        b_k = tl.load(p_k_block, mask=m_key[:, None] & m_k, other=0.0)
        b_v = tl.load(p_v_block, mask=m_key[:, None] & m_v, other=0.0)
    else:
        b_k = tl.load(p_k_block) if HEAD_DIM == BLOCK_D else tl.load(p_k_block, mask=m_k, other=0.0)
        b_v = tl.load(p_v_block) if V_HEAD_DIM == BLOCK_DV else tl.load(p_v_block, mask=m_v, other=0.0)

    # [BLOCK_M, BLOCK_N], in units of log 2; float32 products stay float32.
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if HAS_SOFT_CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        b_s = soft_cap * LOG2E * (1.0 - 2.0 / (tl.exp2(b_s * (scale * 2.0 * LOG2E / soft_cap)) + 1.0))
    else:
        b_s = b_s * (scale * LOG2E)
    if MASKED:
        m_s = m_key[None, :] & (b_key[None, :] <= b_position[:, None])
        if HAS_WINDOW:
            m_s = m_s & (b_position[:, None] - b_key[None, :] < window)
        b_s = tl.where(m_s, b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    b_top = b_new_max
    if MASKED:
        b_top = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)  # a row that has seen nothing yet
    b_p = tl.exp2(b_s - b_top[:, None])
    b_decay = tl.exp2(b_max - b_top)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_o * b_decay[:, None], input_precision="ieee")
    return b_o, b_new_max, b_sum


@triton.jit
def attend_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_o,
    p_lse,
    p_sinks,
    p_count,
    p_units,
    p_rows,
    p_positions,
    p_tables,
    scale,
    window,
    soft_cap,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_table,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    UNIT_FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Run unit ``program // NUM_KV_HEADS`` for KV head ``program % NUM_KV_HEADS``.

    Args:
        p_q: ``[num_tokens, num_q_heads, HEAD_DIM]``, last axis dense.
        p_k: ``[num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM]``, dense; `p_v` likewise.
        p_v: Value pages.
        p_out: ``[num_tokens, num_q_heads, V_HEAD_DIM]``, last axis dense.
        p_o: ``[num_states, num_q_heads, V_HEAD_DIM]`` float32, dense.
        p_lse: ``[num_states, num_q_heads]`` float32, dense.
        p_sinks: ``[num_q_heads]``, read if `HAS_SINKS`.
        p_count: How many units there are; programs beyond them end at once.
        p_units: ``[capacity, UNIT_FIELDS]`` int32, see `layout.UNIT_FIELDS`.
        p_rows: Query tokens of the units, int32.
        p_positions: ``[num_tokens]`` int32.
        p_tables: ``[batch, stride_table]`` int32 page ids.
        scale: Factor of the scores.
        window: Positions a query sees, read if `HAS_WINDOW`.
        soft_cap: Bound of the scaled scores, read if `HAS_SOFT_CAP`.
        stride_q_token: Elements from one token of `p_q` to the next; the other strides likewise.
        stride_q_head: Of `p_q`.
        stride_out_token: Of `p_out`.
        stride_out_head: Of `p_out`.
        stride_table: Of `p_tables`.
    """
    i_unit = tl.program_id(0) // NUM_KV_HEADS
    i_kv_head = tl.program_id(0) % NUM_KV_HEADS
    if i_unit >= tl.load(p_count):
        return
    p_unit = p_units + i_unit * UNIT_FIELDS
    rows_start = tl.load(p_unit)
    num_rows = tl.load(p_unit + 1)
    i_sequence = tl.load(p_unit + 2)
    kv_start = tl.load(p_unit + 3)
    kv_stop = tl.load(p_unit + 4)
    state_start = tl.load(p_unit + 5)

    o_m = tl.arange(0, BLOCK_M)
    o_row = o_m // GROUP_SIZE
    o_head = i_kv_head * GROUP_SIZE + o_m % GROUP_SIZE
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_row = o_row < num_rows
    # [BLOCK_M]
    b_token = tl.load(p_rows + rows_start + o_row, mask=m_row, other=0)
    b_position = tl.load(p_positions + b_token, mask=m_row, other=2147483647)
    # [BLOCK_M, BLOCK_D]
    p_q_block = p_q + b_token.to(tl.int64)[:, None] * stride_q_token + o_head[:, None] * stride_q_head + o_d[None, :]
    b_q = tl.load(p_q_block, mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)

    b_o = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    p_table = p_tables + i_sequence.to(tl.int64) * stride_table
    # Whole blocks that every row sees need no mask; a window hides their other end.
    full_stop = kv_start
    if not HAS_WINDOW:
        visible = tl.minimum(kv_stop - 1, tl.min(b_position, 0)) + 1 - kv_start
        full_stop = kv_start + tl.maximum(visible, 0) // BLOCK_N * BLOCK_N
    for start in range(kv_start, full_stop, BLOCK_N):
        b_o, b_max, b_sum = _step(
            b_o, b_max, b_sum, b_q, b_position, start, kv_stop, i_kv_head, p_k, p_v, p_table, scale, window, soft_cap,
            NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, BLOCK_DV,
            HAS_WINDOW, HAS_SOFT_CAP, MASKED=False,
        )  # fmt: skip
    for start in range(full_stop, kv_stop, BLOCK_N):
        b_o, b_max, b_sum = _step(
            b_o, b_max, b_sum, b_q, b_position, start, kv_stop, i_kv_head, p_k, p_v, p_table, scale, window, soft_cap,
            NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, BLOCK_DV,
            HAS_WINDOW, HAS_SOFT_CAP, MASKED=True,
        )  # fmt: skip

    LN2: tl.constexpr = 0.6931471805599453
    b_total = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_lse = tl.where(b_sum == 0.0, float("-inf"), b_max * LN2 + tl.log(b_total))
    b_o = b_o / b_total[:, None]
    m_out = m_row[:, None] & (o_dv < V_HEAD_DIM)[None, :]
    if state_start < 0:
        if HAS_SINKS:  # one more key with logit `sinks` and value 0
            b_sink = tl.load(p_sinks + o_head).to(tl.float32)
            b_o = b_o / (1.0 + tl.exp(b_sink - b_lse))[:, None]
        p_out_token = p_out + b_token.to(tl.int64) * stride_out_token + o_head * stride_out_head
        tl.store(p_out_token[:, None] + o_dv[None, :], b_o.to(p_out.dtype.element_ty), mask=m_out)
    else:
        b_state = (state_start + o_row).to(tl.int64) * (NUM_KV_HEADS * GROUP_SIZE) + o_head
        tl.store(p_o + b_state[:, None] * V_HEAD_DIM + o_dv[None, :], b_o, mask=m_out)
        tl.store(p_lse + b_state, b_lse, mask=m_row)
