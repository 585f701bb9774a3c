"""The load-time probe: a model that would answer wrongly through paged attention is refused, not served.

transformers lets us replace a model's attention, but not every architecture goes through the replacement, and some do
and still compute something else. So every model first answers the same short prompts twice, stock and paged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from macaw_kernels import DeviceProfile
from macaw_server.engine.attention import (
    ATTENTION_NAME,
    BatchContext,
    LayerSpec,
    UnsupportedAttentionError,
    current_batch,
)
from macaw_server.engine.runner import Chunk, ModelRunner
from macaw_server.errors import ModelLoadError

# How far paged logits may be from stock ones, in standard deviations of the stock logits.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}


def prepare(model: nn.Module, name: str, profile: DeviceProfile) -> dict[int, LayerSpec]:
    """Switch `model` to paged attention after checking that it answers as before.

    Args:
        model: In eval mode with transformers' eager attention.
        name: For messages.
        profile: The attention planner's cost model.

    Returns:
        The shape of each attention layer by ``layer_idx``.

    Raises:
        ModelLoadError: The architecture is not supported; the message says why.
    """
    config: Any = model.config
    prompts = _prompts(config.get_text_config().vocab_size)
    with torch.inference_mode():
        stock = [_stock_logits(model, prompt) for prompt in prompts]
        try:
            layers = _discover(model)
            paged = _paged_logits(model, layers, prompts, profile)
        except UnsupportedAttentionError as e:
            raise _refusal(model, name, str(e)) from e
    for prompt, expected, seen in zip(prompts, stock, paged, strict=True):
        error = ((seen - expected).abs().max() / expected.std().clamp_min(1e-6)).item()
        tolerance = _TOLERANCE[next(model.parameters()).dtype]
        if not error <= tolerance:
            raise _refusal(
                model,
                name,
                f"on a probe of {len(prompt)} tokens its logits are off by {error:.2g} standard deviations "
                f"(accepted: {tolerance:g})",
            )
    return layers


def _refusal(model: nn.Module, name: str, reason: str) -> ModelLoadError:
    return ModelLoadError(
        f"{name} ({type(model).__name__}) is not supported: {reason}. Served through paged attention it would "
        "answer wrongly. Supported are decoder-only models whose attention goes through transformers' "
        "AttentionInterface with full or sliding-window attention."
    )


def _prompts(vocab_size: int) -> list[list[int]]:
    """Two prompts with a common prefix of two pages, and one of their own; token ids spread over the vocabulary."""
    ids = [(7919 * i + 13) % vocab_size for i in range(1, 64)]
    return [ids[:37], ids[:32] + ids[45:50], ids[40:57]]


def _stock_logits(model: nn.Module, prompt: list[int]) -> Tensor:
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits
    return logits[0, -1].float()


def _discover(model: nn.Module) -> dict[int, LayerSpec]:
    """Run two tokens through the model to see which layers call the paged attention, and with which shapes."""
    config: Any = model.config
    model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    device = next(model.parameters()).device
    with current_batch(BatchContext()) as batch:
        model(
            input_ids=torch.tensor([[0, 1]], device=device),
            position_ids=torch.tensor([[0, 1]], device=device),
            use_cache=False,
        )
    expected = config.get_text_config().num_hidden_layers
    if len(batch.seen) != expected:
        raise UnsupportedAttentionError(
            f"{len(batch.seen)} of its {expected} layers go through the replaceable attention"
        )
    return batch.seen


def _paged_logits(
    model: nn.Module, layers: dict[int, LayerSpec], prompts: list[list[int]], profile: DeviceProfile
) -> list[Tensor]:
    """The same prompts as one ragged batch: chunked, with a shared prefix, and with a decode step at the end."""
    dtype = next(model.parameters()).dtype
    runner = ModelRunner(model, layers, num_pages=8, page_size=16, dtype=dtype, profile=profile)
    first, second, third = prompts
    tables = [[5, 2, 7], [5, 2, 1], [4, 0]]
    runner.run([Chunk(first[:20], 0, tables[0], False), Chunk(third[:-1], 0, tables[2], False)])
    logits = runner.run(
        [
            Chunk(first[20:], 20, tables[0], True),
            Chunk(second[32:], 32, tables[1], True),
            Chunk(third[-1:], len(third) - 1, tables[2], True),
        ]
    )
    return list(logits)
