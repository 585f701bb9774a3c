"""From block tables to work items: what the sequences share, and where reading it once pays. No torch.

The block tables of a batch form a forest (a compressed trie): a node is a run of pages and the sequences that
all have it at the same place. Parrot (Lin et al., OSDI 2024, section 7) knows one shared prefix per batch,
cascade inference one level per configuration; here any number of groups and levels come out of the tables
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from macaw_kernels.types import AttentionPlan, DeviceProfile, HeadConfig, IntArray, WorkItem

BlockTable = Sequence[int] | IntArray

_SPARE_PAGES = 16
"""Pages that the sequences of a plan may get before their tables are laid out anew."""
_MANY_ROWS = 4
"""Decisions made for some number of query rows are made anew when that number grows or shrinks this much."""


class _Shared(NamedTuple):
    """A run of pages that `members` read once: pages ``[start, end)`` of their block tables."""

    members: IntArray
    start: int
    end: int


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


class Planner:
    """Plans step after step; what a decode step does not change is taken over from the step before.

    Args:
        head_config: Heads of the layers.
        device_profile: Decides where sharing pays.
        page_size: Tokens a page holds.

    Raises:
        ValueError: `page_size` is below 1.
    """

    def __init__(self, head_config: HeadConfig, device_profile: DeviceProfile, page_size: int) -> None:
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; it must be at least 1")
        self.head_config = head_config
        self.device_profile = device_profile
        self.page_size = page_size
        self._seen: list[BlockTable] = []
        self._tails: list[tuple[int, list[int]]] = []
        self._starts = self._num_pages = np.zeros(0, dtype=np.int64)
        self._tables = np.zeros((0, 0), dtype=np.int64)
        self._num_rows = 0
        self._max_page = -1
        self._own_starts = np.zeros(0, dtype=np.int64)
        self._shared: list[_Shared] = []

    def plan(
        self,
        block_tables: Sequence[BlockTable],
        context_lens: Sequence[int] | IntArray,
        query_lens: Sequence[int] | IntArray,
    ) -> AttentionPlan:
        """Plan one step's attention.

        Only pages that lie wholly before a sequence's first query are shared: a sequence which writes into a
        shared page in this very step attends it on its own, so every row of a shared item sees all of the item.

        Args:
            block_tables: Page ids of each sequence, in order; entries beyond its context are ignored. A table that
                is given again as the same object is taken to have the same pages before its queries' first.
            context_lens: Keys of each sequence, this step's tokens included.
            query_lens: Tokens of each sequence in this step, the last ones of its context: 1 is a decode, more a
                chunk of a prefill. Tokens are laid out in batch order.

        Raises:
            ValueError: The inputs do not describe a batch; the message names the sequence.
        """
        contexts, queries = np.asarray(context_lens, dtype=np.int64), np.asarray(query_lens, dtype=np.int64)
        _check_lens(len(block_tables), contexts, queries)
        starts = contexts - queries
        num_pages = -(-contexts // self.page_size)
        query_starts = np.zeros(len(queries) + 1, dtype=np.int64)
        np.cumsum(queries, out=query_starts[1:])
        if not self._take_over(block_tables, starts, num_pages, int(query_starts[-1])):
            self._tables = _checked_tables(block_tables, contexts, num_pages, self.page_size)
            self._max_page = int(self._tables.max(initial=-1))
            self._num_rows = int(query_starts[-1])
            nodes = _build_forest(self._tables, starts // self.page_size)
            _decide(nodes, contexts, queries, self.head_config, self.device_profile, self.page_size)
            self._own_starts, self._shared = _choices(nodes, len(queries), self.page_size)
        self._remember(block_tables, starts, num_pages)
        return AttentionPlan(
            self.head_config,
            self.device_profile,
            self.page_size,
            self._max_page,
            positions=_ranges(starts, queries),
            block_tables=self._tables,
            query_starts=query_starts,
            context_lens=contexts,
            own_starts=self._own_starts,
            shared=tuple(
                WorkItem(
                    rows=_ranges(query_starts[members], queries[members]),
                    pages=self._tables[members[0], start:end],
                    kv_start=start * self.page_size,
                    kv_len=(end - start) * self.page_size,
                    sequence=int(members[0]),
                )
                for members, start, end in self._shared
            ),
        )

    def _take_over(
        self, block_tables: Sequence[BlockTable], starts: IntArray, num_pages: IntArray, num_rows: int
    ) -> bool:
        """Whether the last step's decisions hold; new pages are then in the tables.

        They do when the same sequences have only grown, and no two of them on a common page. Which pages are read
        at the tails has no say in what pays, nor has the number of rows as long as it is about the same.
        """
        if len(starts) != len(self._starts) or (starts < self._starts).any():
            return False
        if num_rows > self._num_rows * _MANY_ROWS or self._num_rows > num_rows * _MANY_ROWS:
            return False
        for i, (table, seen, (first, tail)) in enumerate(zip(block_tables, self._seen, self._tails, strict=True)):
            known = first + len(tail)
            if table is not seen:
                if not np.array_equal(table[:known], self._tables[i, :known]):
                    return False
            elif list(table[first:known]) != tail:
                return False
        return self._append_pages(block_tables, num_pages) and not self._new_common_pages(starts)

    def _append_pages(self, block_tables: Sequence[BlockTable], num_pages: IntArray) -> bool:
        """Write pages that the sequences have got into the tables; False if they have no room."""
        if num_pages.max(initial=0) > self._tables.shape[1]:
            return False
        for i in np.flatnonzero(num_pages > self._num_pages).tolist():
            known, used = int(self._num_pages[i]), int(num_pages[i])
            new = np.asarray(block_tables[i][known:used], dtype=np.int64)
            if len(new) < used - known or new.min() < 0:
                return False  # `_checked_tables` says what is wrong
            self._tables[i, known:used] = new
            self._max_page = max(self._max_page, int(new.max()))
        return True

    def _remember(self, block_tables: Sequence[BlockTable], starts: IntArray, num_pages: IntArray) -> None:
        """Keep what the next step is compared with: the tables, and copies of their tails, which may change."""
        self._seen, self._starts, self._num_pages = list(block_tables), starts, num_pages
        self._tails = [
            (first, list(table[first:used]))
            for table, first, used in zip(
                block_tables, (starts // self.page_size).tolist(), num_pages.tolist(), strict=True
            )
        ]

    def _new_common_pages(self, starts: IntArray) -> bool:
        """Whether a page that only now lies wholly before a sequence's queries is another sequence's, too."""
        before, now = self._starts // self.page_size, starts // self.page_size
        grown = np.flatnonzero(now > before)
        if not len(grown):
            return False
        sequences, pages = np.repeat(grown, (now - before)[grown]), _ranges(before[grown], (now - before)[grown])
        same = self._tables[:, pages] == self._tables[sequences, pages]
        return bool(same.sum() > len(pages))


def plan(
    block_tables: Sequence[BlockTable],
    context_lens: Sequence[int] | IntArray,
    query_lens: Sequence[int] | IntArray,
    head_config: HeadConfig,
    device_profile: DeviceProfile,
    page_size: int,
) -> AttentionPlan:
    """Plan one step's attention from nothing; see `Planner`, which is faster for a series of steps."""
    return Planner(head_config, device_profile, page_size).plan(block_tables, context_lens, query_lens)


def _check_lens(batch: int, contexts: IntArray, queries: IntArray) -> None:
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


def _checked_tables(
    block_tables: Sequence[BlockTable], contexts: IntArray, num_pages: IntArray, page_size: int
) -> IntArray:
    """Return the tables as one matrix with some columns to grow into, padded with -1."""
    tables = np.full((len(block_tables), num_pages.max(initial=0) + _SPARE_PAGES), -1, dtype=np.int64)
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


def _choices(nodes: list[_Node], batch: int, page_size: int) -> tuple[IntArray, list[_Shared]]:
    """Return where each sequence's own item starts (in tokens), and the shared runs of pages."""
    own_starts = np.zeros(batch, dtype=np.int64)
    shared = []
    for node in nodes:
        start = int(node.starts[node.start_index])
        if node.share[node.start_index]:
            shared.append(_Shared(node.members, start, node.end))
            start = node.end
        own_starts[node.leaves] = start * page_size
    return own_starts, shared


def _ranges(starts: IntArray, lens: IntArray) -> IntArray:
    """Concatenate ``arange(start, start + len)`` over all pairs."""
    total = int(lens.sum())
    return np.repeat(starts - (np.cumsum(lens) - lens), lens) + np.arange(total)
