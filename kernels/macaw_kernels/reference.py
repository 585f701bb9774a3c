"""The truth that every kernel is tested against: dense, one sequence at a time, no plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference_attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Sequence[Sequence[int]],
    context_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Paged causal attention as the formula says; see `attend` for shapes and options.

    For query position ``i`` and the key positions ``j`` with ``i - window < j <= i``:

        s_j = q_i . k_j * scale,  s_j = soft_cap * tanh(s_j / soft_cap),
        o_i = sum_j exp(s_j) v_j / (exp(sink) + sum_j exp(s_j))

    Args:
        q: Queries of all sequences.
        k_pages: Key pages.
        v_pages: Value pages.
        block_tables: Page ids of each sequence.
        context_lens: Keys of each sequence.
        query_lens: Queries of each sequence, the last positions of its context.
        scale: Factor of the scores.
        window: Visible positions, the own one included.
        soft_cap: Bound of the scaled scores.
        sinks: Extra logit of each query head.
        dtype: What to compute in and to return.
    """
    num_q_heads, group_size = q.shape[1], q.shape[1] // k_pages.shape[2]
    outs = []
    rows = torch.split(q.to(dtype), list(query_lens))
    for q_seq, table, context in zip(rows, block_tables, context_lens, strict=True):
        pages = torch.as_tensor(table, device=q.device)
        # [context, num_q_heads, head_dim]: each KV head repeated for the query heads that read it.
        k, v = (
            kv[pages].flatten(0, 1)[:context].to(dtype).repeat_interleave(group_size, dim=1)
            for kv in (k_pages, v_pages)
        )
        scores = torch.einsum("qhd,khd->hqk", q_seq, k) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        key = torch.arange(context, device=q.device)
        position = key[context - len(q_seq) :, None]
        visible = key <= position
        if window is not None:
            visible &= position - key < window
        scores = scores.masked_fill(~visible, -torch.inf)
        sink = torch.full((num_q_heads,), -torch.inf, device=q.device) if sinks is None else sinks
        sink_column = sink.to(dtype)[:, None, None].expand(-1, len(q_seq), 1)
        weights = torch.softmax(torch.cat([scores, sink_column], dim=-1), dim=-1)[..., :-1]
        outs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outs)
