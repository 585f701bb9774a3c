"""The model runner: one ragged batch in, one row of logits per sampled token out."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from macaw_kernels import DeviceProfile, HeadConfig, Planner
from macaw_server.engine.attention import BatchContext, LayerSpec, PagedKV
from macaw_server.engine.forward import ForwardPass


class Chunk(NamedTuple):
    """New tokens of one sequence in a step.

    Attributes:
        token_ids: The tokens to compute.
        start: Position of the first of them.
        block_table: Pages of the sequence, in order; they cover ``start + len(token_ids)`` tokens.
        num_samples: Logits of so many of the last tokens are wanted.
    """

    token_ids: Seq[int]
    start: int
    block_table: Seq[int]
    num_samples: int


class ModelRunner:
    """Runs a model over a flattened ragged batch with paged K/V.

    Args:
        forward: The model.
        layers: Its attention layers.
        num_pages: Pages in the pool.
        page_size: Tokens per page.
        dtype: Of K/V.
        device: Of the model.
        profile: The attention planner's cost model, by heads.
        attention_backend: Runs the attention of transformers' modules; None is the best for their heads.
    """

    def __init__(
        self,
        forward: ForwardPass,
        layers: dict[int, LayerSpec],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        profile: Callable[[HeadConfig], DeviceProfile],
        attention_backend: str | None = None,
    ) -> None:
        self._forward = forward
        self._device = device
        self._attention_backend = attention_backend
        self._kv = PagedKV(layers, num_pages, page_size, dtype, self._device)
        self._planners = {
            heads: Planner(heads, profile(heads), page_size) for heads in {spec.heads for spec in layers.values()}
        }

    @torch.inference_mode()
    def run(self, chunks: Seq[Chunk]) -> Tensor:
        """Compute a step.

        Args:
            chunks: At least one. A chunk may read pages that another chunk of the same step computes: in every
                layer all K/V is stored before attention runs.

        Returns:
            ``[num_samples, vocab_size]`` float32 logits of all chunks, in order.
        """
        lengths = np.array([len(chunk.token_ids) for chunk in chunks])
        context_lens = np.array([chunk.start for chunk in chunks]) + lengths
        tables = [chunk.block_table for chunk in chunks]
        plans = {heads: planner.plan(tables, context_lens, lengths) for heads, planner in self._planners.items()}
        any_plan = next(iter(plans.values()))  # they differ in what is shared, not in the batch
        batch = BatchContext(
            plans=plans,
            slot_mapping=torch.from_numpy(any_plan.slot_mapping()).to(self._device),
            kv=self._kv,
            backend=self._attention_backend,
        )
        token_ids = [token for chunk in chunks for token in chunk.token_ids]
        ends = np.cumsum(lengths).tolist()
        rows = [row for chunk, end in zip(chunks, ends, strict=True) for row in range(end - chunk.num_samples, end)]
        return self._forward(
            torch.tensor(token_ids, device=self._device),
            torch.from_numpy(any_plan.positions).to(self._device),
            batch,
            torch.tensor(rows, dtype=torch.long, device=self._device),
        )
