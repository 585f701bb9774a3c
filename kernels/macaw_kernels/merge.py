"""Attention states and their merge.

Attention over a set of keys is the state ``(o, lse)``: the softmax-weighted mean of the values and the log of
the sum of the exponentiated scores. States over disjoint sets merge exactly (FlashInfer, Ye et al., MLSys
2025, section 2.2):

    lse = log(sum_i exp(lse_i)),  o = sum_i exp(lse_i - lse) * o_i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionState(NamedTuple):
    """Attention over some keys: `o` ``[..., v_head_dim]`` and `lse` ``[...]`` (natural log), both float32.

    No keys are ``(0, -inf)``, which merges as nothing.
    """

    o: Tensor
    lse: Tensor


def merge_states(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> AttentionState:
    """Merge attention states over disjoint sets of keys.

    Args:
        outs: Any number of ``[..., v_head_dim]``, or one tensor with the states in front.
        lses: As many ``[...]``, natural log. Where one is -inf its `o` counts for nothing, NaN included.

    Raises:
        ValueError: No states, or not as many outs as lses.
    """
    if len(outs) != len(lses) or not len(outs):
        raise ValueError(f"{len(outs)} outs and {len(lses)} lses; as many of each, and at least one")
    o = outs if isinstance(outs, Tensor) else torch.stack(tuple(outs))
    lse = lses if isinstance(lses, Tensor) else torch.stack(tuple(lses))
    top = lse.amax(dim=0)
    top = top.masked_fill(top == -torch.inf, 0.0)  # where all are empty the weights become 0, not NaN
    weight = torch.exp(lse - top).unsqueeze(-1)
    total = weight.sum(dim=0)
    # Divided by their sum, the weights are exact however large the scores are.
    mean = (o * weight).masked_fill(weight == 0, 0.0).sum(dim=0) / total.masked_fill(total == 0, 1.0)
    return AttentionState(mean, top + total.squeeze(-1).log())
