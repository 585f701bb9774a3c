"""The model runner: one ragged batch in, one row of logits per sampled token out."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from macaw_kernels import AttentionPlan, DeviceProfile, HeadConfig, Planner
from macaw_kernels.transfers import upload
from macaw_kernels.types import IntArray
from macaw_server.engine.attention import BatchContext, LayerSpec, PagedKV
from macaw_server.engine.forward import ForwardPass
from macaw_server.engine.graphs import Capture, DecodeGraphs


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
        num_pages: Pages in the pool; there is one more, for what a batch is filled up with.
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
        self._layers = layers
        self._dtype, self._device = dtype, device
        self._attention_backend = attention_backend
        self._kv = PagedKV(layers, num_pages + 1, page_size, dtype, device)
        self._padding = Chunk((0,), 0, [num_pages], 1)  # its K/V goes to a page that nobody has
        self._planners = {
            heads: Planner(heads, profile(heads), page_size) for heads in {spec.heads for spec in layers.values()}
        }
        self._graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def use_graphs(self, capture: Capture, *, max_num_seqs: int, max_model_len: int) -> list[int]:
        """Run decode steps as graphs from now on, each captured at the first step of its size.

        Args:
            capture: Makes the graphs.
            max_num_seqs: The largest batch.
            max_model_len: The longest sequence, in tokens.

        Returns:
            The sizes of batches that have a graph; the others are filled up to the next of them.

        Raises:
            GraphError: The model's attention cannot be captured.
        """
        self._graphs = DecodeGraphs(
            self._forward,
            self._layers,
            self._kv,
            max_num_seqs=max_num_seqs,
            max_pages=-(-max_model_len // self._kv.page_size),
            dtype=self._dtype,
            device=self._device,
            capture=capture,
            attention_backend=self._attention_backend,
        )
        return self._graphs.sizes

    def drop_graphs(self) -> None:
        """Run all steps without graphs from now on."""
        self._graphs = None

    @torch.inference_mode()
    def run(self, chunks: Seq[Chunk], token_ids: Tensor | None = None, *, graphs: bool = True) -> Tensor:
        """Compute a step. On a GPU this only issues the work: nothing waits for the device.

        Args:
            chunks: At least one. A chunk may read pages that another chunk of the same step computes: in every
                layer all K/V is stored before attention runs.
            token_ids: ``[num_tokens]`` int64 on the device, where only that knows them; those of the chunks then say
                no more than how many there are.
            graphs: Use them where there are any.

        Returns:
            ``[num_samples, vocab_size]`` float32 logits of all chunks, in order; of a graph they are there until the
            next step.
        """
        num_samples = sum(chunk.num_samples for chunk in chunks)
        graph = self._graphs if graphs and all(len(c.token_ids) == c.num_samples == 1 for c in chunks) else None
        if graph is not None and (size := graph.bucket(len(chunks))) is not None:
            chunks = [*chunks, *[self._padding] * (size - len(chunks))]
        else:
            graph = None
        lengths = np.array([len(chunk.token_ids) for chunk in chunks])
        context_lens = np.array([chunk.start for chunk in chunks]) + lengths
        tables = [chunk.block_table for chunk in chunks]
        plans = {heads: planner.plan(tables, context_lens, lengths) for heads, planner in self._planners.items()}
        known = np.array([token for chunk in chunks for token in chunk.token_ids], dtype=np.int64)
        logits = None if graph is None else graph.run(plans, known, token_ids)
        if logits is None:
            logits = self._run_eagerly(chunks, plans, lengths, known, token_ids)
        return logits[:num_samples]

    def _run_eagerly(
        self,
        chunks: Seq[Chunk],
        plans: dict[HeadConfig, AttentionPlan],
        lengths: IntArray,
        known: IntArray,
        token_ids: Tensor | None,
    ) -> Tensor:
        any_plan = next(iter(plans.values()))  # they differ in what is shared, not in the batch
        inputs = upload(np.stack([known, any_plan.positions, any_plan.slot_mapping()]), self._device)
        if token_ids is not None:
            inputs[0, : len(token_ids)].copy_(token_ids)
        ends = np.cumsum(lengths).tolist()
        rows = [row for chunk, end in zip(chunks, ends, strict=True) for row in range(end - chunk.num_samples, end)]
        batch = BatchContext(plans, slot_mapping=inputs[2], kv=self._kv, backend=self._attention_backend)
        return self._forward(inputs[0], inputs[1], batch, upload(np.array(rows, dtype=np.int64), self._device))
