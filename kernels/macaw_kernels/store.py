"""The KV store: scatter a step's keys and values into their pages."""

from __future__ import annotations

from torch import Tensor

from macaw_kernels.backends import triton_available


def store_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    """Write the keys and values of a step's tokens into the pages, in place.

    Args:
        k: ``[total_tokens, num_kv_heads, head_dim]``.
        v: ``[total_tokens, num_kv_heads, v_head_dim]``.
        k_pages: ``[num_pages, page_size, num_kv_heads, head_dim]``, contiguous.
        v_pages: ``[num_pages, page_size, num_kv_heads, v_head_dim]``, contiguous.
        slot_mapping: ``[total_tokens]`` int64, ``page * page_size + offset`` of each token; no slot twice.

    Raises:
        IndexError: A slot is outside of the pages (on CPU; a GPU does not write it).
        RuntimeError: Shapes or dtypes do not fit.
    """
    if k_pages.device.type == "cuda" and triton_available():
        from macaw_kernels.triton import backend  # imports Triton

        backend.store_kv(k, v, k_pages, v_pages, slot_mapping)
        return
    for new, pages in ((k, k_pages), (v, v_pages)):
        pages.view(-1, *pages.shape[2:]).index_copy_(0, slot_mapping, new)
