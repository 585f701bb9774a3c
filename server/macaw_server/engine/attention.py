"""Our attention function inside transformers' models: store K/V into pages, then attend over the pages.

The batch of a step is one flattened sequence ``[1, total_tokens]``. What the attention needs to know of it does not
go through the model's keyword arguments (some models drop them) but through one current-batch object per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from macaw_kernels import AttentionPlan, HeadConfig, attend, store_kv

ATTENTION_NAME = "macaw_paged"

# What models pass along that has no say in the result of attention proper.
_HARMLESS = {"position_ids", "use_cache", "output_router_logits", "output_attentions", "position_embeddings"}
_OFF = (None, False, 0, 0.0)


class UnsupportedAttentionError(Exception):
    """A model asks its attention for something that the paged attention does not compute."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One attention layer, as seen in a forward pass.

    Attributes:
        heads: Its heads.
        window: Positions a query sees, its own included; None for all.
        scale: Factor of the scores.
        soft_cap: Of the scores.
    """

    heads: HeadConfig
    window: int | None
    scale: float
    soft_cap: float | None

    def page_bytes(self, page_size: int, dtype: torch.dtype) -> int:
        """Bytes that one page of this layer takes, K and V."""
        return page_size * self.heads.kv_elements * dtype.itemsize


class PagedKV:
    """The tensors behind the page pool, per layer.

    Attributes:
        keys: By ``layer_idx``: ``[num_pages, page_size, num_kv_heads, head_dim]``.
        values: By ``layer_idx``: ``[num_pages, page_size, num_kv_heads, v_head_dim]``.
    """

    def __init__(
        self,
        layers: dict[int, LayerSpec],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def pages(heads: HeadConfig, head_dim: int) -> Tensor:
            return torch.empty(num_pages, page_size, heads.num_kv_heads, head_dim, dtype=dtype, device=device)

        self.page_size = page_size
        self.keys = {i: pages(spec.heads, spec.heads.head_dim) for i, spec in layers.items()}
        self.values = {i: pages(spec.heads, spec.heads.v_head_dim) for i, spec in layers.items()}


@dataclass(slots=True)
class BatchContext:
    """What attention needs to know of the current step.

    Attributes:
        plans: The attention plan of the batch for each head shape among the layers.
        slot_mapping: ``[total_tokens]`` int64, page * page_size + offset, where each token's K/V goes.
        kv: The page tensors; None while the layers are being discovered.
        backend: Runs the attention; None is the best for these layers.
        seen: Filled on the way: the layers that called, and their shapes.
        modules: Filled while the layers are being discovered: their modules.
    """

    plans: dict[HeadConfig, AttentionPlan] = field(default_factory=dict)
    slot_mapping: Tensor | None = None
    kv: PagedKV | None = None
    backend: str | None = None
    seen: dict[int, LayerSpec] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)


_local = threading.local()


@contextmanager
def current_batch(batch: BatchContext) -> Iterator[BatchContext]:
    """Make `batch` the one that attention layers of this thread work on."""
    _local.batch = batch
    try:
        yield batch
    finally:
        _local.batch = None


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface over pages.

    Args:
        module: The attention layer; needs a `layer_idx`.
        query: ``[1, num_q_heads, total_tokens, head_dim]``.
        key: ``[1, num_kv_heads, total_tokens, head_dim]``.
        value: ``[1, num_kv_heads, total_tokens, v_head_dim]``.
        attention_mask: Must be None: causality comes from the plan.
        scaling: Softmax scale; default ``head_dim ** -0.5``.
        dropout: Must be 0.
        sliding_window: Positions a query sees, its own included.
        softcap: tanh soft-cap of the scores.
        s_aux: ``[num_q_heads]`` attention sinks.
        others: Refused by name unless they are off or known to have no say.

    Returns:
        ``[1, total_tokens, num_q_heads, v_head_dim]`` and no weights.

    Raises:
        UnsupportedAttentionError: The model needs something that is not computed here.
    """
    batch: BatchContext | None = getattr(_local, "batch", None)
    if batch is None:
        raise RuntimeError("paged attention outside of a batch; run the model through ModelRunner")
    extra = [n for n, v in others.items() if n not in _HARMLESS and (isinstance(v, Tensor) or v not in _OFF)]
    if extra:
        raise UnsupportedAttentionError(f"its attention passes {', '.join(sorted(extra))}, which is not supported")
    if attention_mask is not None:
        raise UnsupportedAttentionError("its attention builds a mask of its own")
    if dropout:
        raise UnsupportedAttentionError(f"its attention has dropout {dropout} at inference")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedAttentionError(f"{type(module).__name__} has no layer_idx")

    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [total_tokens, heads, dim]
    heads = HeadConfig(q.shape[1], k.shape[1], k.shape[2], v.shape[2])
    if layer in batch.seen:
        raise UnsupportedAttentionError(f"two attention layers share layer_idx {layer}")
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    batch.seen[layer] = LayerSpec(heads, sliding_window or None, scale, softcap)
    if batch.kv is None or batch.slot_mapping is None:  # discovering the layers
        batch.modules[layer] = module
        return query.new_zeros(1, q.shape[0], q.shape[1], v.shape[2]), None

    k_pages, v_pages = batch.kv.keys[layer], batch.kv.values[layer]
    store_kv(k, v, k_pages, v_pages, batch.slot_mapping)
    out = attend(
        q,
        k_pages,
        v_pages,
        batch.plans[heads],
        scale=scale,
        window=sliding_window or None,
        soft_cap=softcap,
        sinks=s_aux,
        backend=batch.backend,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
