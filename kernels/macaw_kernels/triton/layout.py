"""From a plan to the units that the kernels run: vectorised, as it happens in every step. No torch.

An item (rows against keys) becomes **tiles** of as many tokens as fit the M axis of a matrix product, a tile's keys
are cut to what its rows see, and long ones are split into **units** of about the same length, so that small batches
fill the chip. A row of which one unit sees all keys is written by it; for other rows the units write states, to be
merged.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from macaw_kernels.triton.configs import SPLIT_STEP, KernelConfig
from macaw_kernels.types import AttentionPlan, IntArray

UNIT_FIELDS = 8
"""int32 fields of a unit: first index into `rows`, number of rows, sequence whose table has the pages, first key,
end of the keys, first state (-1: write the result); two are padding."""


class Capacity(NamedTuple):
    """The most that buffers of fixed size hold.

    Attributes:
        num_tokens: Query tokens; what a captured graph has exactly.
        num_rows: Rows over all items: each token once for its own keys, and once for each shared item.
        num_narrow: Units of few rows.
        num_wide: Other units.
        num_states: Attention states.
        batch: Block tables.
        num_pages: Pages of one block table.
    """

    num_tokens: int
    num_rows: int
    num_narrow: int
    num_wide: int
    num_states: int
    batch: int
    num_pages: int


class Layout(NamedTuple):
    """What the kernels read, but for the block tables.

    Attributes:
        narrow: ``[n, UNIT_FIELDS]`` units of the narrow phase.
        wide: ``[n, UNIT_FIELDS]`` units of the wide phase.
        rows: Query tokens of the units.
        merge_starts: ``[num_tokens + 1]``: token ``i`` merges the states ``merge_states[starts[i] : starts[i + 1]]``.
        merge_states: State ids by token.
        num_states: States that the units write.
    """

    narrow: IntArray
    wide: IntArray
    rows: IntArray
    merge_starts: IntArray
    merge_states: IntArray
    num_states: int


class _Tiles(NamedTuple):
    """Tiles in the order of `rows`, which they cover without gaps."""

    rows_start: IntArray
    num_rows: IntArray
    sequence: IntArray
    kv_start: IntArray
    kv_stop: IntArray
    wide: np.ndarray[tuple[int], np.dtype[np.bool_]]


def build_layout(
    plan: AttentionPlan,
    config: KernelConfig,
    window: int | None,
    num_sms: int,
    capacity: Capacity | None = None,
) -> Layout:
    """Lay out the plan's items for layers with this window.

    Args:
        plan: At least one token.
        config: Tile sizes, and how far to split.
        window: Positions that a query sees.
        num_sms: Multiprocessors to fill.
        capacity: Ranges are split less where there would be more units or states than this.
    """
    rows, tiles = _tiles(plan, config, window)
    split = _split_len(plan, tiles, config, num_sms)
    while True:
        layout = _units(plan, tiles, rows, split)
        longest = int((tiles.kv_stop - tiles.kv_start).max())
        if capacity is None or split >= longest or _fits(layout, capacity):
            return layout
        split *= 2


def check_capacity(plan: AttentionPlan, layout: Layout, capacity: Capacity) -> None:
    """Refuse a layout that is too large for buffers of fixed size.

    Raises:
        ValueError: What does not fit.
    """
    found = (
        ("query tokens", plan.num_tokens, capacity.num_tokens),
        ("rows", len(layout.rows), capacity.num_rows),
        ("narrow units", len(layout.narrow), capacity.num_narrow),
        ("wide units", len(layout.wide), capacity.num_wide),
        ("states", layout.num_states, capacity.num_states),
        ("sequences", len(plan.context_lens), capacity.batch),
        ("pages of a sequence", int(-(-plan.context_lens.max() // plan.page_size)), capacity.num_pages),
    )
    for name, seen, most in found:
        if seen > most:
            raise ValueError(f"the plan has {seen} {name}, its buffers hold {most}: run it without a graph")
    if plan.num_tokens != capacity.num_tokens:
        raise ValueError(f"the plan has {plan.num_tokens} query tokens, its graph {capacity.num_tokens}: pad the batch")


def decode_capacity(
    batch: int, num_pages: int, group_size: int, num_kv_heads: int, config: KernelConfig, num_sms: int, levels: int = 4
) -> Capacity:
    """Room for any decode step of `batch` sequences whose forest of shared prefixes is up to `levels` deep.

    Args:
        batch: Sequences, with one query token each.
        num_pages: Pages of the longest sequence.
        group_size: Query heads of a KV head.
        num_kv_heads: KV heads.
        config: Launch parameters.
        num_sms: Multiprocessors.
        levels: Shared items that a sequence is part of, at most.
    """
    narrow_rows, wide_rows = config.narrow.block_m // group_size, config.wide.block_m // group_size
    splits = -(-num_sms * config.programs_per_sm // num_kv_heads)
    # A shared item has at least two rows; each has at most one tile that is not full.
    shared_tiles = levels * (batch // 2)
    num_narrow = batch + shared_tiles + splits
    num_wide = levels * batch // max(1, min(wide_rows, narrow_rows + 1)) + levels + splits
    num_states = batch * (1 + levels) + splits * max(narrow_rows, wide_rows)
    return Capacity(batch, batch * (1 + levels), num_narrow, num_wide, num_states, batch, num_pages)


def _tiles(plan: AttentionPlan, config: KernelConfig, window: int | None) -> tuple[IntArray, _Tiles]:
    """Cut the items' rows into tiles, and the tiles' keys to what their rows see."""
    shared, batch, group_size = plan.shared, len(plan.context_lens), plan.head_config.group_size
    rows = np.concatenate([np.arange(plan.num_tokens), *(item.rows for item in shared)])
    item_rows = np.concatenate([np.diff(plan.query_starts), [len(item.rows) for item in shared]]).astype(np.int64)
    sequence = np.concatenate([np.arange(batch), [item.sequence for item in shared]]).astype(np.int64)
    kv_start = np.concatenate([plan.own_starts, [item.kv_start for item in shared]]).astype(np.int64)
    kv_stop = np.concatenate([plan.context_lens, [item.kv_start + item.kv_len for item in shared]]).astype(np.int64)
    narrow_rows, wide_rows = config.narrow.block_m // group_size, config.wide.block_m // group_size
    wide = item_rows > narrow_rows
    tile_rows = np.where(wide, wide_rows, narrow_rows)

    num_tiles = -(-item_rows // tile_rows)
    item, nth = _expand(num_tiles)
    tile_rows = tile_rows[item]
    rows_start = (np.cumsum(item_rows) - item_rows)[item] + nth * tile_rows
    num_rows = np.minimum(tile_rows, item_rows[item] - nth * tile_rows)
    positions = plan.positions[rows]
    stop = np.minimum(kv_stop[item], np.maximum.reduceat(positions, rows_start) + 1)
    start = kv_start[item]
    if window is not None:
        start = np.maximum(start, np.minimum.reduceat(positions, rows_start) - window + 1)
    return rows, _Tiles(rows_start, num_rows, sequence[item], start, stop, wide[item])


def _split_len(plan: AttentionPlan, tiles: _Tiles, config: KernelConfig, num_sms: int) -> int:
    """Keys of a unit, so that all units together keep the chip busy."""
    total = int(np.maximum(tiles.kv_stop - tiles.kv_start, 0).sum())
    wanted = -(-num_sms * config.programs_per_sm // plan.head_config.num_kv_heads)
    return max(config.min_split, -(-total // wanted))


def _units(plan: AttentionPlan, tiles: _Tiles, rows: IntArray, split: int) -> Layout:
    """Split the tiles' keys into units, the longest first, and number the states that they write."""
    lens = np.maximum(tiles.kv_stop - tiles.kv_start, 0)  # 0: the window hides a shared item from a tile
    num_splits = -(-lens // split)
    # Of equal length, or the last would be a rest that leaves its multiprocessor idle.
    step = -(-lens // np.maximum(num_splits, 1))
    step = np.maximum(-(-step // SPLIT_STEP) * SPLIT_STEP, 1)
    num_splits = -(-lens // step)

    # A row that one unit sees all keys of needs no merge; a tile is written directly if that holds for all its rows.
    per_token = np.bincount(rows, weights=np.repeat(num_splits, tiles.num_rows), minlength=plan.num_tokens)
    direct = np.maximum.reduceat(per_token[rows], tiles.rows_start) == 1

    tile, nth = _expand(num_splits)
    start = tiles.kv_start[tile] + nth * step[tile]
    stop = np.minimum(start + step[tile], tiles.kv_stop[tile])
    order = np.lexsort((start - stop, tiles.wide[tile]))
    tile, start, stop = tile[order], start[order], stop[order]
    num_rows = tiles.num_rows[tile]
    state_rows = np.where(direct[tile], 0, num_rows)
    units = np.zeros((len(tile), UNIT_FIELDS), dtype=np.int64)
    units[:, 0] = tiles.rows_start[tile]
    units[:, 1] = num_rows
    units[:, 2] = tiles.sequence[tile]
    units[:, 3] = start
    units[:, 4] = stop
    units[:, 5] = np.where(direct[tile], -1, np.cumsum(state_rows) - state_rows)

    unit, nth = _expand(state_rows)
    tokens = rows[units[unit, 0] + nth]
    merge_starts = np.zeros(plan.num_tokens + 1, dtype=np.int64)
    np.cumsum(np.bincount(tokens, minlength=plan.num_tokens), out=merge_starts[1:])
    num_narrow = len(tile) - int(tiles.wide[tile].sum())
    merge_states = np.argsort(tokens, kind="stable")
    return Layout(units[:num_narrow], units[num_narrow:], rows, merge_starts, merge_states, len(tokens))


def _fits(layout: Layout, capacity: Capacity) -> bool:
    return (
        len(layout.narrow) <= capacity.num_narrow
        and len(layout.wide) <= capacity.num_wide
        and layout.num_states <= capacity.num_states
    )


def _expand(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Return for each of ``sum(counts)`` parts what it is a part of, and the how-manieth."""
    whole = np.repeat(np.arange(len(counts)), counts)
    return whole, np.arange(len(whole)) - np.repeat(np.cumsum(counts) - counts, counts)
