"""The units of work that the Triton kernels get; no Triton needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.batches import THREE_LEVELS, Seq, forests, make_batch
from macaw_kernels import ALWAYS_SHARE, NEVER_SHARE, AttentionPlan, HeadConfig, plan
from macaw_kernels.triton.configs import KernelConfig, built_in
from macaw_kernels.triton.layout import Layout, build_layout, check_capacity, decode_capacity

HEADS = HeadConfig(4, 1, 16, 16)
CONFIG = replace(built_in("sm_90", 16, torch.bfloat16), min_split=64)


def covered(plan: AttentionPlan, layout: Layout, window: int | None) -> None:
    """Every visible (row, key) is in one unit, states are written once, and the merge reads just those of a row."""
    seen: Counter[tuple[int, int, int]] = Counter()
    states: dict[int, int] = {}
    direct: set[int] = set()
    sequences = np.repeat(np.arange(len(plan.context_lens)), np.diff(plan.query_starts))
    for rows_start, num_rows, sequence, start, stop, state in np.concatenate([layout.narrow, layout.wide])[:, :6]:
        for i, row in enumerate(layout.rows[rows_start : rows_start + num_rows].tolist()):
            position = plan.positions[row]
            first = start if window is None else max(start, position - window + 1)
            for key in range(first, min(stop, position + 1)):
                page = plan.block_tables[sequence, key // plan.page_size]
                assert page == plan.block_tables[sequences[row], key // plan.page_size]
                seen[row, key, 0] += 1
            if state < 0:
                assert row not in direct
                direct.add(row)
            else:
                assert state + i not in states
                states[state + i] = row
    assert set(seen.values()) <= {1}
    for row, position in enumerate(plan.positions.tolist()):
        first = 0 if window is None else max(0, position - window + 1)
        assert sum((row, key, 0) in seen for key in range(first, position + 1)) == position + 1 - first
        merged = layout.merge_states[layout.merge_starts[row] : layout.merge_starts[row + 1]].tolist()
        assert sorted(merged) == sorted(state for state, owner in states.items() if owner == row)
        assert (row in direct) == (not merged)
    assert layout.num_states == len(states)


@settings(max_examples=60, deadline=None)
@given(forests(), st.booleans(), st.none() | st.integers(1, 80), st.sampled_from([1, 30]))
def test_units_cover_every_visible_key_once(
    sequences: list[Seq], share: bool, window: int | None, num_sms: int
) -> None:
    batch = make_batch(sequences, HEADS, page_size=8)
    step_plan = batch.plan(ALWAYS_SHARE if share else NEVER_SHARE)
    covered(step_plan, build_layout(step_plan, CONFIG, window, num_sms), window)


def test_long_ranges_are_split_evenly_and_run_longest_first() -> None:
    step_plan = make_batch([Seq(own=1000), Seq(own=130), Seq(own=20)], HEADS).plan(NEVER_SHARE)
    layout = build_layout(step_plan, CONFIG, None, num_sms=100)
    covered(step_plan, layout, None)
    lens = (layout.narrow[:, 4] - layout.narrow[:, 3]).tolist()
    assert lens == sorted(lens, reverse=True)
    assert lens.count(64) == 15 + 2


def test_enough_work_is_not_split() -> None:
    step_plan = make_batch([Seq(own=1000)] * 8, HEADS).plan(NEVER_SHARE)
    layout = build_layout(step_plan, CONFIG, None, num_sms=1)
    assert layout.num_states == 0
    assert len(layout.narrow) == 8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 400)), min_size=1, max_size=40), st.integers(1, 64))
def test_decode_capacity_holds_any_decode_step(shapes: list[tuple[int, int]], num_sms: int) -> None:
    """Trees of up to three levels."""
    path = {"system": 2, "doc": 3, "turn": 40}
    sequences = [Seq(dict(list(path.items())[:levels]), own) for levels, own in shapes]
    batch = make_batch(sequences, HEADS)
    capacity = decode_capacity(len(sequences), 100, HEADS.group_size, HEADS.num_kv_heads, CONFIG, num_sms)
    step_plan = batch.plan(ALWAYS_SHARE)
    layout = build_layout(step_plan, CONFIG, None, num_sms, capacity)
    check_capacity(step_plan, layout, capacity)
    covered(step_plan, layout, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 90}, "pad the batch"),
        ({"num_rows": 80}, "rows"),
        ({"num_narrow": 3}, "narrow units"),
        ({"num_wide": 0}, "wide units"),
        ({"num_states": 1}, "states"),
        ({"batch": 9}, "10 sequences, its buffers hold 9"),
        ({"num_pages": 4}, "pages of a sequence"),
    ],
)
def test_a_plan_that_is_too_large_is_refused(change: dict[str, int], message: str) -> None:
    step_plan = make_batch(THREE_LEVELS, HEADS).plan(ALWAYS_SHARE)
    layout = build_layout(step_plan, CONFIG, None, 4)
    roomy = decode_capacity(100, 100, 4, 1, CONFIG, 100)._replace(num_tokens=step_plan.num_tokens)
    check_capacity(step_plan, layout, roomy)
    with pytest.raises(ValueError, match=message):
        check_capacity(step_plan, layout, roomy._replace(**change))


def test_a_group_larger_than_a_tile_gets_a_larger_tile() -> None:
    config: KernelConfig = CONFIG.for_group(48)
    assert (config.narrow.block_m, config.wide.block_m) == (64, 64)
    step_plan = plan([[0]], [5], [5], HeadConfig(48, 1, 16, 16), NEVER_SHARE, 16)
    covered(step_plan, build_layout(step_plan, config, None, 1), None)
