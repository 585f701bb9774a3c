"""From block tables to work items: what the sequences share, and where reading it once pays. No torch.

The block tables of a batch form a forest (a compressed trie): a node is a run of pages and the sequences that
all have it at the same place. Parrot (Lin et al., OSDI 2024, section 7) knows one shared prefix per batch,
cascade inference one level per configuration; here any number of groups and levels come out of the tables
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from macaw_kernels.types import AttentionPlan, DeviceProfile, HeadConfig, IntArray, WorkItem

BlockTable = Sequence[int] | IntArray


@dataclass(slots=True)
class _Node:
    """A run of pages up to page `end` that all members share, from its parent's end on; see `_decide`."""

    end: int
    members: IntArray
    starts: IntArray
    children: list[_Node] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)
    costs: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    share: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1, dtype=np.bool_))
    start_index: int = 0


def plan(
    block_tables: Sequence[BlockTable],
    context_lens: Sequence[int] | IntArray,
    query_lens: Sequence[int] | IntArray,
    head_config: HeadConfig,
    device_profile: DeviceProfile,
    page_size: int,
) -> AttentionPlan:
    """Plan one step's attention.

    Only pages that lie wholly before a sequence's first query are shared: a sequence which writes into a
    shared page in this very step attends it on its own, so every row of a shared item sees all of the item.

    Args:
        block_tables: Page ids of each sequence, in order; entries beyond its context are ignored.
        context_lens: Keys of each sequence, this step's tokens included.
        query_lens: Tokens of each sequence in this step, the last ones of its context: 1 is a decode, more a
            chunk of a prefill. Tokens are laid out in batch order.
        head_config: Heads of the layers.
        device_profile: Decides where sharing pays.
        page_size: Tokens a page holds.

    Raises:
        ValueError: The inputs do not describe a batch; the message names the sequence.
    """
    contexts, queries = np.asarray(context_lens, dtype=np.int64), np.asarray(query_lens, dtype=np.int64)
    tables = _checked_tables(block_tables, contexts, queries, page_size)
    nodes = _build_forest(tables, (contexts - queries) // page_size)
    _decide(nodes, contexts, queries, head_config, device_profile, page_size)

    first_rows = np.cumsum(queries) - queries
    own_starts, shared = _shared_items(nodes, tables, first_rows, queries, page_size)
    own = tuple(
        WorkItem(
            rows=np.arange(row, row + query),
            pages=tables[i, start // page_size : -(-context // page_size)],
            kv_start=start,
            kv_len=context - start,
        )
        for i, (row, query, context, start) in enumerate(
            zip(first_rows.tolist(), queries.tolist(), contexts.tolist(), own_starts, strict=True)
        )
    )
    positions = _ranges(contexts - queries, queries)
    max_page = int(tables.max(initial=-1))
    return AttentionPlan(head_config, device_profile, page_size, max_page, positions, own, shared)


def _checked_tables(
    block_tables: Sequence[BlockTable], contexts: IntArray, queries: IntArray, page_size: int
) -> IntArray:
    """Return the tables as one matrix ``[batch, pages of the longest context]``, padded with -1."""
    batch = len(block_tables)
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}; it must be at least 1")
    if contexts.shape != (batch,) or queries.shape != (batch,):
        raise ValueError(
            f"{batch} block tables, {contexts.shape} context_lens and {queries.shape} query_lens: "
            "each sequence needs one of each"
        )
    for i in np.flatnonzero((queries < 1) | (queries > contexts)).tolist():
        raise ValueError(
            f"sequence {i}: query_len {queries[i]} with context_len {contexts[i]}; "
            "at least 1 and at most the context, which includes this step's tokens"
        )
    num_pages = -(-contexts // page_size)
    tables = np.full((batch, num_pages.max(initial=0)), -1, dtype=np.int64)
    for i, (table, used) in enumerate(zip(block_tables, num_pages.tolist(), strict=True)):
        if len(table) < used:
            raise ValueError(
                f"sequence {i}: a context of {contexts[i]} tokens needs {used} pages of {page_size}, "
                f"its block table has {len(table)}"
            )
        tables[i, :used] = table[:used]
        if used and tables[i, :used].min() < 0:
            raise ValueError(f"sequence {i}: negative page id {tables[i, :used].min()} in its block table")
    return tables


def _build_forest(tables: IntArray, shareable: IntArray) -> list[_Node]:
    """Build the trie over the first `shareable` pages of each sequence; parents come before their children.

    The first node is the root of the forest: all sequences, no pages.
    """
    batch, width = tables.shape
    # One more column, and beyond its shareable pages each sequence gets an id of its own: every run ends by
    # itself.
    keys = np.full((batch, width + 1), -1, dtype=np.int64)
    keys[:, :width] = tables
    keys = np.where(np.arange(width + 1) < shareable[:, None], keys, -1 - np.arange(batch)[:, None])

    nodes = [_Node(end=0, members=np.arange(batch), starts=np.zeros(1, dtype=np.int64))]
    for node in nodes:
        groups: dict[int, list[int]] = {}
        for i, key in zip(node.members.tolist(), keys[node.members, node.end].tolist(), strict=True):
            groups.setdefault(key, []).append(i)
        child_starts = np.append(node.starts, node.end) if node.end else node.starts
        for group in groups.values():
            if len(group) == 1:
                node.leaves += group
                continue
            members = np.array(group)
            rest = keys[members, node.end :]
            run = int(np.argmax((rest != rest[0]).any(axis=0)))
            child = _Node(end=node.end + run, members=members, starts=child_starts)
            node.children.append(child)
            nodes.append(child)
    return nodes


def _decide(
    nodes: list[_Node],
    contexts: IntArray,
    queries: IntArray,
    head_config: HeadConfig,
    profile: DeviceProfile,
    page_size: int,
) -> None:
    """Choose the nodes that become shared items, at the least cost over the whole forest.

    A node that is not shared hands its pages down to its children. So what a subtree costs depends on where
    the last shared ancestor ended: `starts` holds the candidates (page 0, or the end of any ancestor), and
    the least costs are computed for all of them at once, from the leaves up:

        cost(node, start) = min(item(start .. end) + below(end), below(start)),
        below(start) = sum of cost(child, start) + sum of the own reads of the leaves from start on.

    Then the choices are read from the root down, into `start_index` (where the node's range starts) and
    `share`.
    """
    token_ns = head_config.kv_elements * profile.kv_element_ns
    state_ns = head_config.num_q_heads * head_config.v_head_dim * profile.state_element_ns
    for node in reversed(nodes):
        below_starts = np.append(node.starts, node.end) if node.end else node.starts
        own_tokens = contexts[node.leaves].sum() - len(node.leaves) * page_size * below_starts
        below = token_ns * own_tokens
        for child in node.children:
            below = below + child.costs
        if not node.end:
            continue  # the root: nothing to share
        rows = queries[node.members].sum()
        tokens = page_size * (node.end - node.starts)
        shared = 1000 * profile.share_us + rows * state_ns + token_ns * tokens + below[-1]
        node.share = shared < below[:-1]
        node.costs = np.minimum(shared, below[:-1])
    for node in nodes:
        for child in node.children:
            child.start_index = len(child.starts) - 1 if node.share[node.start_index] else node.start_index


def _shared_items(
    nodes: list[_Node], tables: IntArray, first_rows: IntArray, queries: IntArray, page_size: int
) -> tuple[list[int], tuple[WorkItem, ...]]:
    """Return where each sequence's own item starts (in tokens), and the shared items."""
    own_starts = [0] * len(tables)
    shared = []
    for node in nodes:
        start = int(node.starts[node.start_index])
        if node.share[node.start_index]:
            shared.append(
                WorkItem(
                    rows=_ranges(first_rows[node.members], queries[node.members]),
                    pages=tables[node.members[0], start : node.end],
                    kv_start=start * page_size,
                    kv_len=(node.end - start) * page_size,
                )
            )
            start = node.end
        for i in node.leaves:
            own_starts[i] = start * page_size
    return own_starts, tuple(shared)


def _ranges(starts: IntArray, lens: IntArray) -> IntArray:
    """Concatenate ``arange(start, start + len)`` over all pairs."""
    total = int(lens.sum())
    return np.repeat(starts - (np.cumsum(lens) - lens), lens) + np.arange(total)
