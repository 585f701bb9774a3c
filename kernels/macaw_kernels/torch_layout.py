"""From a plan to the batched attention calls of the torch path, with everything that no layer changes.

Work items become **spans**: rows that see all of a key range, a causal square, or what a mask says. Spans
with equally many rows and similar key counts then become one **tile**: one gather of keys and values, one
attention call. What a tile computes for a row is an attention state. State ``r`` of the first ``num_tokens``
belongs to row ``r``; further states of a row come after, in waves that hold each row at most once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from macaw_kernels.types import AttentionPlan, IntArray, WorkItem

MASK_ROWS = 256
"""Rows of one masked span: bounds its mask, and how many keys it reads for nothing."""

Index = slice | Tensor
"""Where rows are: a slice needs no copy."""


@dataclass(slots=True)
class Tile:
    """One attention call: `num_spans` spans of `num_rows` rows each, against `num_keys` gathered keys each.

    Attributes:
        rows: ``[num_spans * num_rows]`` query tokens.
        states: ``[num_spans * num_rows]`` attention states to write.
        slots: ``[num_spans * num_keys]`` slots of the keys.
        causal: The rows are the positions of the keys: row ``i`` sees keys up to ``i``.
        mask: Added to the scores: ``[num_spans, 1, 1, 1 or num_rows, num_keys]`` float32, 0 or -inf.
    """

    num_spans: int
    num_rows: int
    num_keys: int
    rows: Index
    states: Index
    slots: Index
    causal: bool
    mask: Tensor | None


@dataclass(slots=True)
class Wave:
    """Further states: ``states[i]`` is to be merged into state ``rows[i]``."""

    rows: Index
    states: slice


@dataclass(slots=True)
class Layout:
    """All attention calls of one layer, and how their states merge."""

    tiles: list[Tile]
    waves: list[Wave]
    num_states: int


@dataclass(slots=True)
class _Span:
    """Rows against the keys at positions ``[start, stop)`` of an item; `visible` None means all of them."""

    item: WorkItem
    rows: IntArray
    start: int
    stop: int
    causal: bool = False
    visible: np.ndarray[tuple[int, int], np.dtype[np.bool_]] | None = None

    @property
    def num_keys(self) -> int:
        return self.stop - self.start

    @property
    def packable(self) -> bool:
        return not self.causal and self.visible is None


def build_layout(plan: AttentionPlan, window: int | None, device: torch.device) -> Layout:
    """Lay out the plan's items for layers with this window."""
    # The spans with the rows' own keys come first and in batch order: they write the first `num_tokens`
    # states.
    first: list[_Span] = []
    further: list[_Span] = []
    for item in plan.own():
        spans = _own_spans(item, plan.positions[item.rows], window)
        first += spans[0]
        further += spans[1]
    for item in plan.shared:
        further += _shared_spans(item, plan.positions[item.rows], window)

    spans_in_order = first + further
    states, wave_rows = _number_states(spans_in_order, plan.num_tokens)
    tiles = [
        _tile(plan, [spans_in_order[i] for i in batch], np.concatenate([states[i] for i in batch]), device)
        for batch in _pack(spans_in_order, plan)
    ]
    waves, start = [], plan.num_tokens
    for rows in wave_rows:
        waves.append(Wave(_index(rows, device), slice(start, start + len(rows))))
        start += len(rows)
    return Layout(tiles, waves, start)


def _own_spans(item: WorkItem, positions: IntArray, window: int | None) -> tuple[list[_Span], list[_Span]]:
    """Split a sequence's own item into the spans that hold the rows' own keys, and the rest."""
    first_position, stop = int(positions[0]), int(positions[-1]) + 1
    if len(positions) == 1:
        start = item.kv_start if window is None else max(item.kv_start, stop - window)
        return [_Span(item, item.rows, start, stop)], []
    if window is not None and stop - window > item.kv_start:
        return list(_masked_spans(item, item.rows, positions, window)), []
    square = _Span(item, item.rows, first_position, stop, causal=True)
    if first_position == item.kv_start:
        return [square], []
    return [square], [_Span(item, item.rows, item.kv_start, first_position)]


def _shared_spans(item: WorkItem, positions: IntArray, window: int | None) -> Iterator[_Span]:
    """Cut a shared item to what the window leaves; without one every row sees all of it."""
    stop = item.kv_start + item.kv_len
    if window is None or positions.max() - item.kv_start < window:
        yield _Span(item, item.rows, item.kv_start, stop)
        return
    inside = positions - (stop - 1) < window
    yield from _masked_spans(item, item.rows[inside], positions[inside], window)


def _masked_spans(item: WorkItem, rows: IntArray, positions: IntArray, window: int) -> Iterator[_Span]:
    for i in range(0, len(rows), MASK_ROWS):
        block = positions[i : i + MASK_ROWS, None]
        start = max(item.kv_start, int(block.min()) - window + 1)
        stop = min(item.kv_start + item.kv_len, int(block.max()) + 1)
        keys = np.arange(start, stop)
        visible = (keys <= block) & (block - keys < window)
        yield _Span(item, rows[i : i + MASK_ROWS], start, stop, visible=None if visible.all() else visible)


def _number_states(spans: list[_Span], num_tokens: int) -> tuple[list[IntArray], list[IntArray]]:
    """Return the state ids of each span's rows, and the rows of each wave beyond the first states."""
    seen = np.zeros(num_tokens, dtype=np.int64)
    ranks = []
    for span in spans:
        ranks.append(seen[span.rows])
        seen[span.rows] += 1
    lens = [len(span.rows) for span in spans]
    rank = np.concatenate(ranks)
    order = np.argsort(rank, kind="stable")
    ids = np.empty_like(order)
    ids[order] = np.arange(len(order))
    rows = np.concatenate([span.rows for span in spans])[order]
    wave_ends = np.cumsum(np.bincount(rank))
    return np.split(ids, np.cumsum(lens)[:-1]), np.split(rows, wave_ends[:-1])[1:]


def _pack(spans: list[_Span], plan: AttentionPlan) -> list[list[int]]:
    """Group the spans into tiles: equally many rows, and padding that costs less than another call."""
    profile = plan.device_profile
    padding = 1000 * profile.launch_us / (profile.kv_element_ns * plan.head_config.kv_elements)
    tile_keys = profile.tile_bytes // (4 * plan.head_config.kv_elements)
    batches: list[list[int]] = []
    longest, num_rows = 0, 0
    for i in sorted(range(len(spans)), key=lambda i: (-len(spans[i].rows), -spans[i].num_keys)):
        span = spans[i]
        if not span.packable:
            batches.append([i])
            num_rows = 0
        elif (
            len(span.rows) == num_rows
            and longest - span.num_keys <= padding
            and longest * (len(batches[-1]) + 1) <= tile_keys
        ):
            batches[-1].append(i)
        else:
            batches.append([i])
            longest, num_rows = span.num_keys, len(span.rows)
    return batches


def _tile(plan: AttentionPlan, spans: list[_Span], states: IntArray, device: torch.device) -> Tile:
    num_keys = spans[0].num_keys
    mask = None
    if spans[0].visible is not None:
        mask = spans[0].visible[None]
    elif spans[-1].num_keys < num_keys:
        mask = np.arange(num_keys) < np.array([span.num_keys for span in spans])[:, None, None]
    return Tile(
        num_spans=len(spans),
        num_rows=len(spans[0].rows),
        num_keys=num_keys,
        rows=_index(np.concatenate([span.rows for span in spans]), device),
        states=_index(states, device),
        slots=_slots(spans, num_keys, plan.page_size, device),
        causal=spans[0].causal,
        mask=None if mask is None else _additive(mask, device),
    )


def _slots(spans: list[_Span], num_keys: int, page_size: int, device: torch.device) -> Index:
    """Slots of the spans' keys, padded to `num_keys` with their last one, so that none holds garbage."""
    slots = []
    for span in spans:
        offsets = np.arange(span.start, span.start + num_keys) - span.item.kv_start
        if num_keys > span.num_keys:
            offsets = np.minimum(offsets, span.stop - 1 - span.item.kv_start)
        slots.append(span.item.pages[offsets // page_size] * page_size + offsets % page_size)
    return _index(np.concatenate(slots), device)


def _additive(visible: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], device: torch.device) -> Tensor:
    mask = np.where(visible, np.float32(0), np.float32(-np.inf))
    return torch.from_numpy(mask).to(device)[:, None, None]


def _index(values: IntArray, device: torch.device) -> Index:
    """A slice where the values are consecutive (pages often are), else a tensor."""
    if len(values) and values[-1] - values[0] == len(values) - 1 and (np.diff(values) == 1).all():
        return slice(int(values[0]), int(values[-1]) + 1)
    return torch.from_numpy(values).to(device)
