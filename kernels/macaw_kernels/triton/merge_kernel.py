"""The merge of any number of attention states of a row (FlashInfer, Ye et al., MLSys 2025, section 2.2)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    p_o,
    p_lse,
    p_sinks,
    p_starts,
    p_states,
    p_out,
    stride_out_token,
    stride_out_head,
    NUM_Q_HEADS: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Merge the states of one token and head; a token that has none is left as it is.

        out = sum_i exp(lse_i) o_i / (exp(sink) + sum_i exp(lse_i))

    Args:
        p_o: ``[num_states, NUM_Q_HEADS, V_HEAD_DIM]`` float32.
        p_lse: ``[num_states, NUM_Q_HEADS]`` float32; -inf where a state saw no key.
        p_sinks: ``[NUM_Q_HEADS]``, read if `HAS_SINKS`.
        p_starts: ``[num_tokens + 1]`` int32: token ``i`` has the states ``p_states[p_starts[i] : p_starts[i + 1]]``.
        p_states: State ids, int32.
        p_out: ``[num_tokens, NUM_Q_HEADS, V_HEAD_DIM]``, last axis dense.
        stride_out_token: Elements from one token of `p_out` to the next.
        stride_out_head: Elements from one head of `p_out` to the next.
    """
    i_token = tl.program_id(0) // NUM_Q_HEADS
    i_head = tl.program_id(0) % NUM_Q_HEADS
    first = tl.load(p_starts + i_token)
    stop = tl.load(p_starts + i_token + 1)
    if first == stop:
        return
    o_dv = tl.arange(0, BLOCK_DV)
    b_o = tl.zeros([BLOCK_DV], dtype=tl.float32)
    b_sum = tl.zeros([1], dtype=tl.float32)
    b_max = tl.full([1], float("-inf"), dtype=tl.float32)
    if HAS_SINKS:
        b_max = tl.zeros([1], dtype=tl.float32) + tl.load(p_sinks + i_head).to(tl.float32)
        b_sum = tl.full([1], 1.0, dtype=tl.float32)
    for start in range(first, stop, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < stop
        # [BLOCK_S]
        b_state = tl.load(p_states + o_s, mask=m_s, other=0).to(tl.int64) * NUM_Q_HEADS + i_head
        b_lse = tl.load(p_lse + b_state, mask=m_s, other=float("-inf"))
        # [BLOCK_S, BLOCK_DV]
        m_part = m_s[:, None] & (o_dv < V_HEAD_DIM)[None, :]
        b_part = tl.load(p_o + b_state[:, None] * V_HEAD_DIM + o_dv[None, :], mask=m_part, other=0.0)
        b_new_max = tl.maximum(b_max, tl.max(b_lse, 0))
        b_top = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_weight = tl.exp(b_lse - b_top)
        b_decay = tl.exp(b_max - b_top)
        b_o = b_o * b_decay + tl.sum(b_part * b_weight[:, None], 0)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 0)
        b_max = b_new_max
    b_o = b_o / b_sum
    p_out_row = p_out + i_token.to(tl.int64) * stride_out_token + i_head * stride_out_head
    tl.store(p_out_row + o_dv, b_o.to(p_out.dtype.element_ty), mask=o_dv < V_HEAD_DIM)
