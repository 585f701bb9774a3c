"""Merging attention states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from macaw_kernels import AttentionState, merge_states


def states(num: int, seed: int = 0, scale: float = 5.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, 4, 8, generator=generator), scale * torch.randn(num, 3, 4, generator=generator)


def test_parts_of_the_keys_merge_to_attention_over_all() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, v = torch.randn(5, 40, generator=generator), torch.randn(40, 8, generator=generator)
    parts = [slice(0, 1), slice(1, 17), slice(17, 17), slice(17, 40)]
    merged = merge_states(
        [torch.nan_to_num(torch.softmax(scores[:, part], -1)) @ v[part] for part in parts],
        [torch.logsumexp(scores[:, part], -1) for part in parts],
    )
    torch.testing.assert_close(merged.o, torch.softmax(scores, -1) @ v)
    torch.testing.assert_close(merged.lse, torch.logsumexp(scores, -1))


@settings(max_examples=50, deadline=None)
@given(
    num=st.integers(2, 6),
    cut=st.integers(1, 5),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 50.0]),
)
def test_associative_and_commutative(num: int, cut: int, seed: int, scale: float) -> None:
    outs, lses = states(num, seed, scale)
    whole = merge_states(outs, lses)
    cut = min(cut, num - 1)
    left, right = merge_states(outs[:cut], lses[:cut]), merge_states(outs[cut:], lses[cut:])
    for parts in ([left, right], [right, left]):
        merged = merge_states([part.o for part in parts], [part.lse for part in parts])
        torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)


def test_empty_states_merge_as_nothing_even_when_their_values_are_nan() -> None:
    outs, lses = states(1)
    empty = AttentionState(torch.full_like(outs[0], torch.nan), torch.full_like(lses[0], -torch.inf))
    merged = merge_states([empty.o, outs[0], empty.o], [empty.lse, lses[0], empty.lse])
    torch.testing.assert_close(merged, AttentionState(outs[0], lses[0]))
    nothing = merge_states([empty.o, empty.o], [empty.lse, empty.lse])
    assert (nothing.o == 0).all()
    assert (nothing.lse == -torch.inf).all()


def test_one_state_is_itself() -> None:
    outs, lses = states(1)
    torch.testing.assert_close(merge_states(outs, lses), AttentionState(outs[0], lses[0]))


def test_large_scores_do_not_overflow() -> None:
    outs, _ = states(2)
    lses = torch.stack([torch.full((3, 4), 1000.0), torch.full((3, 4), 1000.0)])
    merged = merge_states(outs, lses)
    torch.testing.assert_close(merged.o, outs.mean(0))


@pytest.mark.parametrize(("num_outs", "num_lses"), [(0, 0), (2, 1)])
def test_refused(num_outs: int, num_lses: int) -> None:
    with pytest.raises(ValueError, match=f"{num_outs} outs and {num_lses} lses"):
        merge_states([torch.zeros(1, 8)] * num_outs, [torch.zeros(1)] * num_lses)
