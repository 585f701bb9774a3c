"""`attend`: check the arguments, pick a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from macaw_kernels.backends import BACKENDS, best_backend
from macaw_kernels.types import AttentionPlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: AttentionPlan,
    out: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention of a step's tokens over their paged contexts; softmax and sums in float32.

    The step's own keys and values must be in the pages already (`store_kv`). Slots of a sequence's last page
    beyond its context, and pages of nobody, may hold anything: they are never read into a result.

    Args:
        q: ``[total_tokens, num_q_heads, head_dim]``, float32, bfloat16 or float16.
        k_pages: ``[num_pages, page_size, num_kv_heads, head_dim]``, contiguous, dtype of `q`.
        v_pages: ``[num_pages, page_size, num_kv_heads, v_head_dim]``, contiguous, dtype of `q`.
        plan: The step's plan; use one for all layers with the same heads.
        out: ``[total_tokens, num_q_heads, v_head_dim]`` to write into; made anew when None.
        scale: Factor of the scores, usually ``head_dim ** -0.5``.
        window: A query sees that many positions, its own included (transformers' `sliding_window`).
        soft_cap: Scaled scores become ``soft_cap * tanh(score / soft_cap)``.
        sinks: ``[num_q_heads]``, one more logit per head in the softmax's denominator (GPT-OSS).
        backend: A name of `BACKENDS`; None is the best that takes these heads, device and dtype.

    Returns:
        `out`.

    Raises:
        ValueError: Shapes, dtypes or options do not fit the plan, or the backend does not take them.
    """
    heads = plan.head_config
    _check_shape("q", q, (plan.num_tokens, heads.num_q_heads, heads.head_dim))
    if out is None:
        out = q.new_empty(plan.num_tokens, heads.num_q_heads, heads.v_head_dim)
    _check_shape("out", out, (plan.num_tokens, heads.num_q_heads, heads.v_head_dim))
    num_pages = k_pages.shape[0]
    _check_shape("k_pages", k_pages, (num_pages, plan.page_size, heads.num_kv_heads, heads.head_dim))
    _check_shape("v_pages", v_pages, (num_pages, plan.page_size, heads.num_kv_heads, heads.v_head_dim))
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError("k_pages and v_pages must be contiguous: keys and values are tensors of their own")
    if q.dtype not in DTYPES or not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(
            f"q is {q.dtype}, k_pages {k_pages.dtype}, v_pages {v_pages.dtype}; "
            f"all the same and one of {', '.join(map(str, DTYPES))}"
        )
    if plan.max_page >= num_pages:
        raise ValueError(f"the plan uses page {plan.max_page}, k_pages has {num_pages} pages")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; at least 1 (the own position), or None")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap is {soft_cap}; more than 0, or None")
    if sinks is not None:
        _check_shape("sinks", sinks, (heads.num_q_heads,))
    if backend is None:
        backend = best_backend(heads, q.device, q.dtype)
    elif backend not in BACKENDS or not BACKENDS[backend].supports(heads, q.device, q.dtype):
        able = [name for name, each in BACKENDS.items() if each.supports(heads, q.device, q.dtype)]
        raise ValueError(f"backend {backend!r} does not take {heads} in {q.dtype} on {q.device}; {able} do")
    if plan.num_tokens:
        run = BACKENDS[backend].attend
        with torch.no_grad():
            run(q, k_pages, v_pages, plan, out, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks)
    return out


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the plan needs {expected}")
