"""The forward pass of a step: transformers' own modules, or the native decoder."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from macaw_kernels.cpu.decoder import NativeDecoder
from macaw_server.engine.attention import ATTENTION_NAME, BatchContext, current_batch, paged_attention


class ForwardPass(Protocol):
    """From a step's tokens to logits, K/V going to its pages on the way."""

    def __call__(self, token_ids: Tensor, positions: Tensor, batch: BatchContext, rows: Tensor) -> Tensor:
        """Compute a step.

        Args:
            token_ids: ``[num_tokens]`` int64.
            positions: ``[num_tokens]`` int64.
            batch: Plans, slots and pages.
            rows: ``[num_rows]`` int64: the tokens whose logits are wanted.

        Returns:
            ``[num_rows, vocab_size]`` float32.
        """
        ...


class StockForward:
    """Transformers' modules, with `macaw_paged` as their attention.

    Args:
        model: A causal language model in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def compile(self) -> None:
        """Have `torch.compile` work on the modules; the attention, a kernel already, breaks its graphs."""
        attention = torch.compiler.disable(paged_attention)  # type: ignore[no-untyped-call]
        AttentionInterface.register(ATTENTION_NAME, attention)
        self.model.compile(dynamic=True)

    def __call__(self, token_ids: Tensor, positions: Tensor, batch: BatchContext, rows: Tensor) -> Tensor:
        """See `ForwardPass`."""
        keep = {"logits_to_keep": rows} if self._keeps_rows and len(rows) else {}
        with current_batch(batch):
            logits: Tensor = self.model(
                input_ids=token_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, **keep
            ).logits[0]
        return (logits if keep else logits[rows]).float()


class NativeForward:
    """The native CPU decoder: one call for all layers.

    Args:
        decoder: Has the model's weights.
    """

    def __init__(self, decoder: NativeDecoder) -> None:
        self.decoder = decoder

    def __call__(self, token_ids: Tensor, positions: Tensor, batch: BatchContext, rows: Tensor) -> Tensor:
        """See `ForwardPass`; positions come with the plan."""
        assert batch.kv is not None
        assert batch.slot_mapping is not None
        plan = batch.plans[self.decoder.heads]
        return self.decoder.forward(token_ids, plan, batch.slot_mapping, rows, batch.kv.keys, batch.kv.values)
