"""Decode steps as captured graphs: a step of many small kernels is launched at once.

A graph computes over the same addresses in every replay. So for each size of a batch, its *bucket*, the inputs lie in
tensors that stay, and the attention plans in `PlanBuffers`; a smaller batch is filled up with sequences of one token,
on a page of nobody. What captures is an argument: with one that returns the function that it is given, all of this runs
on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from macaw_kernels import AttentionPlan, HeadConfig, best_backend
from macaw_kernels.transfers import staged
from macaw_kernels.triton.buffers import PlanBuffers, decode_buffers
from macaw_kernels.types import IntArray
from macaw_server.engine.attention import BatchContext, LayerSpec, PagedKV
from macaw_server.engine.forward import ForwardPass

log = logging.getLogger(__name__)

Run = Callable[[], Tensor]
"""Computes over tensors that stay, and returns logits that the next call overwrites."""
Capture = Callable[[Run], Run]
"""Makes of a function one that does the same without its Python; may run it on the way."""

Plans = Mapping[HeadConfig, AttentionPlan]


class GraphError(Exception):
    """The decode steps of this model cannot be graphs; the message says why."""


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that are captured: 1, 2, 4, every multiple of 8, and the largest."""
    sizes = {1, 2, 4, *range(8, max_num_seqs, 8), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def cuda_capture() -> Capture:
    """Captures CUDA graphs, which share their memory: only one of them runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Run) -> Run:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels and makes workspaces: neither may happen in a capture
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture


@dataclass(slots=True)
class _Bucket:
    """What one size of a batch computes over.

    Attributes:
        inputs: ``[3, size]`` int64: token ids, positions, slots.
        buffers: What holds the plans, with their heads.
        plans: Those that were captured; of the step for a backend that has no buffers.
        run: Computes the logits, once it is captured.
    """

    inputs: Tensor
    buffers: list[tuple[HeadConfig, PlanBuffers]]
    plans: dict[HeadConfig, AttentionPlan] = field(default_factory=dict)
    run: Run | None = None


class DecodeGraphs:
    """The graphs of a model.

    Args:
        forward: The model.
        layers: Its attention layers.
        kv: Its pages.
        max_num_seqs: The largest batch.
        max_pages: Pages of the longest sequence.
        dtype: Of K/V.
        device: Of the model.
        capture: See `Capture`.
        attention_backend: Runs the attention; None is the best for their heads.
    """

    def __init__(
        self,
        forward: ForwardPass,
        layers: Mapping[int, LayerSpec],
        kv: PagedKV,
        *,
        max_num_seqs: int,
        max_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture,
        attention_backend: str | None,
    ) -> None:
        self.sizes = bucket_sizes(max_num_seqs)
        self._forward = forward
        self._kv = kv
        self._device = device
        self._capture = capture
        self._attention_backend = attention_backend
        kinds = {(spec.heads, spec.window) for spec in layers.values()}
        backends = {heads: attention_backend or best_backend(heads, device, dtype) for heads, _ in kinds}
        if device.type == "cuda" and set(backends.values()) != {"triton"}:
            raise GraphError("its attention does not run on Triton, and only Triton's plans have a fixed place")
        self._buckets = {
            size: _Bucket(
                torch.zeros(3, size, dtype=torch.int64, device=device),
                [
                    (heads, decode_buffers(heads, window, size, max_pages, device, dtype))
                    for heads, window in kinds
                    if backends[heads] == "triton"
                ],
            )
            for size in self.sizes
        }
        self._rows = torch.arange(self.sizes[-1], device=device)
        self._refused = False

    def bucket(self, num_seqs: int) -> int | None:
        """The size that a batch is filled up to; None if it is larger than all."""
        return next((size for size in self.sizes if size >= num_seqs), None)

    def run(self, plans: Plans, known: IntArray, token_ids: Tensor | None) -> Tensor | None:
        """Compute a decode step of exactly a bucket's size; the first one of a size is captured.

        Args:
            plans: Of the batch.
            known: ``[size]`` token ids, as far as the host knows them.
            token_ids: On the device, instead of as many of the first ones.

        Returns:
            ``[size, vocab_size]`` float32 logits, which the next step of that size overwrites; None if the plans do
            not fit: such a step is not for a graph.
        """
        any_plan = next(iter(plans.values()))
        bucket = self._buckets[any_plan.num_tokens]
        try:
            for heads, buffers in bucket.buffers:
                buffers.load(plans[heads])
        except ValueError as e:
            if not self._refused:
                log.info("a decode step of %d sequences runs without its graph; others may, too: %s", len(known), e)
            self._refused = True
            return None
        if bucket.run is None or not bucket.buffers:  # what is captured keeps its plans, and finds these in the buffers
            bucket.plans.update(plans)
        inputs = np.stack([known, any_plan.positions, any_plan.slot_mapping()])
        bucket.inputs.copy_(staged(inputs, self._device), non_blocking=True)
        if token_ids is not None:
            bucket.inputs[0, : len(token_ids)].copy_(token_ids)
        if bucket.run is None:
            bucket.run = self._capture(lambda: self._compute(bucket))
        return bucket.run()

    def _compute(self, bucket: _Bucket) -> Tensor:
        token_ids, positions, slot_mapping = bucket.inputs
        batch = BatchContext(bucket.plans, slot_mapping, self._kv, self._attention_backend)
        return self._forward(token_ids, positions, batch, self._rows[: len(token_ids)])
