"""The portable two-phase path: plain torch, any device and dtype, computed in float32."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from macaw_kernels.merge import AttentionState
from macaw_kernels.torch_layout import Index, Layout, Tile, build_layout
from macaw_kernels.types import AttentionPlan

MAX_SCORES = 1 << 22
"""Scores that the dense path holds at a time, in elements."""


@dataclass(slots=True)
class _Scratch:
    """Buffers for gathered keys and values, used by every tile and layer: fresh memory costs page faults."""

    buffers: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name, dtype] = torch.empty(size, dtype=dtype, device=like.device)
        return buffer[:size].view(shape)


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
    """Run the plan into `out`; arguments as in `macaw_kernels.attend`, already checked."""
    heads = plan.head_config
    layout = _layout(plan, window, q.device)
    scratch: _Scratch = plan.cache.setdefault(("torch", "scratch", q.device), _Scratch())
    slots_k, slots_v = k_pages.view(-1, *k_pages.shape[2:]), v_pages.view(-1, *v_pages.shape[2:])

    shape = (layout.num_states, heads.num_q_heads, heads.v_head_dim)
    in_place = not layout.waves and out.dtype == torch.float32
    o = out if in_place else q.new_empty(shape, dtype=torch.float32)
    lse = q.new_empty(shape[:2], dtype=torch.float32)
    for tile in layout.tiles:
        b, m = tile.num_spans, tile.num_rows
        b_q = q[tile.rows].float().view(b, m, heads.num_kv_heads, heads.group_size, heads.head_dim)
        b_k = _gather("k", slots_k, tile.slots, scratch).view(b, tile.num_keys, *slots_k.shape[1:])
        b_v = _gather("v", slots_v, tile.slots, scratch).view(b, tile.num_keys, *slots_v.shape[1:])
        b_q, b_k, b_v = b_q.permute(0, 2, 3, 1, 4), b_k.transpose(1, 2), b_v.transpose(1, 2)
        state = _tile_state(b_q, b_k, b_v, tile, scale, soft_cap)
        o[tile.states] = state.o.permute(0, 3, 1, 2, 4).reshape(-1, *shape[1:])
        lse[tile.states] = state.lse.permute(0, 3, 1, 2).reshape(-1, shape[1])

    for wave in layout.waves:  # `merge_states` of two, both known to have keys
        lse_a, lse_b = lse[wave.rows], lse[wave.states]
        o[wave.rows] = torch.lerp(o[wave.rows], o[wave.states], torch.sigmoid(lse_b - lse_a).unsqueeze(-1))
        lse[wave.rows] = torch.logaddexp(lse_a, lse_b)
    o, lse = o[: plan.num_tokens], lse[: plan.num_tokens]
    if sinks is not None:  # one more key with logit `sinks` and value 0
        o *= torch.sigmoid(lse - sinks.float()).unsqueeze(-1)
    if not in_place:
        out.copy_(o)


def _layout(plan: AttentionPlan, window: int | None, device: torch.device) -> Layout:
    if window is not None and window > plan.positions.max():
        window = None  # hides nothing
    key = ("torch", "layout", window, device)
    layout: Layout | None = plan.cache.get(key)
    if layout is None:
        layout = plan.cache[key] = build_layout(plan, window, device)
    return layout


def _gather(name: str, flat: Tensor, slots: Index, scratch: _Scratch) -> Tensor:
    """Return ``flat[slots]`` in float32, as a view where nothing has to move."""
    if isinstance(slots, slice):
        rows = flat[slots]
    else:
        rows = scratch.take(name, (len(slots), *flat.shape[1:]), flat, flat.dtype)
        torch.index_select(flat, 0, slots, out=rows)
    if rows.dtype == torch.float32:
        return rows
    return scratch.take(name, tuple(rows.shape), flat, torch.float32).copy_(rows)


def _tile_state(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, soft_cap: float | None) -> AttentionState:
    """Attention of a tile.

    Args:
        q: ``[num_spans, num_kv_heads, group_size, num_rows, head_dim]``.
        k: ``[num_spans, num_kv_heads, num_keys, head_dim]``.
        v: ``[num_spans, num_kv_heads, num_keys, v_head_dim]``.
        tile: Mask or causality.
        scale: Factor of the scores.
        soft_cap: Bound of the scaled scores.

    Returns:
        `o` ``[num_spans, num_kv_heads, group_size, num_rows, v_head_dim]``, `lse` without the last axis.
    """
    if soft_cap is None and q.device.type == "cpu":
        return _flash_state(q, k, v, tile, scale)
    return _dense_state(q, k, v, tile, scale, soft_cap)


def _flash_state(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> AttentionState:
    """PyTorch's CPU flash attention: unlike the public `scaled_dot_product_attention` it returns the LSE.

    It needs equal head dims, float32 masks, at least one key, and one visible key in each row.
    """
    v_head_dim, width = v.shape[-1], max(k.shape[-1], v.shape[-1])
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    mask = None if tile.mask is None else tile.mask[:, 0]
    if tile.causal or (mask is not None and mask.shape[-2] > 1):
        # Rows differ in what they see: KV heads go to the batch axis, and each is broadcast to its query
        # heads.
        group = (-1, q.shape[2], -1, -1)
        q4, k4, v4 = q[0], k[0].unsqueeze(1).expand(group), v[0].unsqueeze(1).expand(group)
    else:
        # The query heads of a KV head and all rows are one matrix: keys and values are read once.
        q4, k4, v4 = q.flatten(2, 3), k, v
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q4, k4, v4, is_causal=tile.causal, attn_mask=mask, scale=scale
    )
    return AttentionState(o.reshape(q.shape)[..., :v_head_dim], lse.reshape(q.shape[:-1]))


def _dense_state(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, soft_cap: float | None) -> AttentionState:
    """Matrix products with the scores in memory, some rows at a time: for what flash attention cannot do."""
    b, h, g, num_rows, _ = q.shape
    step = max(1, MAX_SCORES // (b * h * g * tile.num_keys))
    outs, lses = [], []
    for start in range(0, num_rows, step):
        b_q = q[:, :, :, start : start + step]
        rows = b_q.shape[3]
        num_keys = start + rows if tile.causal else tile.num_keys
        scores = b_q.flatten(2, 3) @ k[:, :, :num_keys].mT * scale
        if soft_cap is not None:
            scores.div_(soft_cap).tanh_().mul_(soft_cap)
        by_row = scores.view(b, h, g, rows, num_keys)
        if tile.causal:
            key = torch.arange(num_keys, device=q.device)
            by_row.masked_fill_(key > key[start:, None], -torch.inf)
        elif tile.mask is not None:
            by_row += tile.mask if tile.mask.shape[-2] == 1 else tile.mask[..., start : start + step, :]
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        o = scores.sub_(lse).exp_() @ v[:, :, :num_keys]
        outs.append(o.view(b, h, g, rows, -1))
        lses.append(lse.view(b, h, g, rows))
    return AttentionState(torch.cat(outs, dim=3), torch.cat(lses, dim=3))
