"""The reference itself, against attention code that is not ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from kernels.batches import Seq, make_batch
from macaw_kernels import HeadConfig

HEADS = HeadConfig(4, 2, 16, 16)
SINKS = torch.linspace(-2, 2, 4)


def gemma2(*args: Any, mask: Tensor, scale: float) -> Tensor:
    module: Any = SimpleNamespace(num_key_value_groups=2, training=False)
    out: Tensor = modeling_gemma2.eager_attention_forward(module, *args, mask, scaling=scale, softcap=1.5)[0]
    return out


def gpt_oss(*args: Any, mask: Tensor, scale: float) -> Tensor:
    module: Any = SimpleNamespace(num_key_value_groups=2, training=False, sinks=SINKS)
    out: Tensor = modeling_gpt_oss.eager_attention_forward(module, *args, mask, scaling=scale)[0]
    return out


@pytest.mark.parametrize("window", [None, 1, 9, 64])
@pytest.mark.parametrize(("model", "options"), [(gemma2, {"soft_cap": 1.5}), (gpt_oss, {"sinks": SINKS})])
def test_agrees_with_transformers(model: Any, options: dict[str, Any], window: int | None) -> None:
    context, query = 45, 20
    batch = make_batch([Seq(own=context, query=query)], HEADS)
    k, v = (
        pages[batch.block_tables[0]].flatten(0, 1)[:context].transpose(0, 1)[None]
        for pages in (batch.k_pages, batch.v_pages)
    )
    distance = torch.arange(context - query, context)[:, None] - torch.arange(context)
    hidden = (distance < 0) | (distance >= (window or context))
    mask = torch.zeros(query, context).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
    expected = model(batch.q.transpose(0, 1)[None], k, v, mask=mask, scale=batch.scale)[0]
    got = batch.reference(torch.float32, window=window, **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
