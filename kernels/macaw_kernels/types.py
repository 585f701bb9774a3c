"""The nouns of attention: head shapes, what a device is good at, and the plan of one step. No torch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Attention heads of one layer: MHA, GQA or MQA by the ratio of query to KV heads.

    Attributes:
        num_q_heads: Query heads, a multiple of `num_kv_heads`; query head ``h`` reads KV head ``h //
            group_size``.
        num_kv_heads: Key and value heads.
        head_dim: Width of a query or key head.
        v_head_dim: Width of a value head; differs from `head_dim` in DeepSeek's MLA.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        """Refuse shapes that no layer has."""
        if min(self.num_q_heads, self.num_kv_heads, self.head_dim, self.v_head_dim) < 1:
            raise ValueError(f"{self}: head counts and head dims must be at least 1")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_q_heads} query heads over {self.num_kv_heads} KV heads: "
                "the number of query heads must be a multiple of the number of KV heads"
            )

    @property
    def name(self) -> str:
        """For tables and files: query heads : KV heads x head dim, such as ``14:2x64``."""
        dims = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim}-{self.v_head_dim}"
        return f"{self.num_q_heads}:{self.num_kv_heads}x{dims}"

    @property
    def group_size(self) -> int:
        """Query heads that read one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def kv_elements(self) -> int:
        """K and V elements of one token."""
        return self.num_kv_heads * (self.head_dim + self.v_head_dim)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Coefficients of the cost model, per layer.

    Sharing a node of ``n`` tokens among ``r`` query rows costs ``share_us``, one read of the tokens and one
    more attention state per row; not sharing it costs a read per consumer. The arithmetic is the same either
    way.

    Attributes:
        name: For logs and benchmark tables.
        share_us: Fixed cost of one shared work item; ``inf`` never shares.
        kv_element_ns: Reading one K or V element.
        state_element_ns: Writing and merging one element of an attention state.
        launch_us: One more attention call: what padding may cost before a batch is split in two.
        tile_bytes: K and V gathered for one attention call, in float32: at most so much, unless one item is
            larger.
    """

    name: str
    share_us: float
    kv_element_ns: float
    state_element_ns: float
    launch_us: float
    tile_bytes: int


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Query rows against a run of pages.

    Row ``r`` sees the item's keys at positions up to its own, ``plan.positions[r]``.

    Attributes:
        rows: Indices into the step's tokens, ascending.
        pages: Page ids, from the page that holds `kv_start`.
        kv_start: Position of the first key; a multiple of the page size.
        kv_len: Number of keys; the last page may be used in part.
        sequence: Whose block table `pages` is a part of: ``block_tables[sequence, kv_start // page_size :]``.
    """

    rows: IntArray
    pages: IntArray
    kv_start: int
    kv_len: int
    sequence: int


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """What one step's attention computes, the same for every layer with these heads.

    Every (row, visible key) pair is in exactly one item: the row's sequence's own, or one shared item on its
    path. The own item of sequence ``i`` has the rows ``query_starts[i] : query_starts[i + 1]`` and the keys at
    positions ``own_starts[i] : context_lens[i]``; all arrays are on the host.

    Attributes:
        head_config: Heads of the layers that this plan is for.
        device_profile: What the decisions were based on.
        page_size: Tokens a page holds.
        max_page: No page id in use is larger.
        positions: ``[num_tokens]``, position of each query token in its sequence.
        block_tables: ``[batch, width]``, page ids of each sequence in order, arbitrary beyond its context.
        query_starts: ``[batch + 1]``, first row of each sequence, and the number of rows.
        context_lens: ``[batch]``, keys of each sequence, this step's tokens included.
        own_starts: ``[batch]``, first position that the sequence attends on its own; a multiple of `page_size`.
        shared: Items of several sequences; every row sees every key of them.
        cache: What a backend derives from the plan (index tensors), filled at the first layer.
    """

    head_config: HeadConfig
    device_profile: DeviceProfile
    page_size: int
    max_page: int
    positions: IntArray
    block_tables: IntArray
    query_starts: IntArray
    context_lens: IntArray
    own_starts: IntArray
    shared: tuple[WorkItem, ...]
    cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def num_tokens(self) -> int:
        """Query tokens of the step, over all sequences."""
        return len(self.positions)

    @property
    def num_kv_tokens(self) -> int:
        """KV tokens that one layer reads."""
        return int((self.context_lens - self.own_starts).sum()) + sum(item.kv_len for item in self.shared)

    @property
    def num_kv_tokens_unshared(self) -> int:
        """KV tokens that one layer would read if nothing were shared."""
        return int(self.context_lens.sum())

    def own(self) -> tuple[WorkItem, ...]:
        """Return one item per sequence, in batch order: its rows against the pages that it does not share."""
        return tuple(
            WorkItem(
                rows=np.arange(self.query_starts[i], self.query_starts[i + 1]),
                pages=self.block_tables[i, start // self.page_size : -(-context // self.page_size)],
                kv_start=start,
                kv_len=context - start,
                sequence=i,
            )
            for i, (start, context) in enumerate(zip(self.own_starts.tolist(), self.context_lens.tolist(), strict=True))
        )

    def slot_mapping(self) -> IntArray:
        """Return ``[num_tokens]``, the slot ``page * page_size + offset`` of each query token."""
        sequences = np.repeat(np.arange(len(self.context_lens)), np.diff(self.query_starts))
        pages = self.block_tables[sequences, self.positions // self.page_size]
        return pages * self.page_size + self.positions % self.page_size
