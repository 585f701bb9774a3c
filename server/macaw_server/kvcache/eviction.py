"""Which cached pages go first: what a node is worth, and a queue by that. Pure.

`least_recently_used` knows nothing but the time of the last use, counted in pages that the cache has taken in since it
is there. `by_value` adds what else is known, in *fills*: times in which the cache takes in as many pages as it has.
What a program in its course will need outlives by so many fills what was used at the same time, and what one program
alone has used and does not need any more goes by so much before that. So nothing stays for ever by what was once known.

(Time plus credit ages as in GreedyDual-Size: Cao & Irani, "Cost-Aware WWW Proxy Caching Algorithms", 1997. Computing a
page again costs about the same wherever it is, so value per page needs no sizes.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from macaw_server.kvcache.node import PUBLIC, Node

EvictionValue = Callable[[Node], float]

CLAIMED = 1.0
"""Fills of what a call needs that waits; half of it for each step more until the call."""
SHARED = 0.5
"""Fills of what several programs have used."""
PRIVATE = -1.0
"""Fills of what one program alone has used, and as far as is known nobody will."""


def least_recently_used(node: Node) -> float:
    """The time of the last use."""
    return node.last_access


def by_value(num_pages: int) -> EvictionValue:
    """Recency and what is known, in a cache of so many pages; declared text goes last of all."""

    def value(node: Node) -> float:
        if node.salt is PUBLIC:
            return math.inf
        if node.claims:
            fills = CLAIMED * math.exp2(-min(node.claims))
        elif node.is_shared:
            fills = SHARED
        else:
            fills = 0.0 if node.may_return else PRIVATE
        return node.last_access + fills * num_pages

    return value


class EvictionQueue:
    """Leaves by value; O(log n) per operation, amortized.

    Entries are lazy. Of a node at most one is valid, `Node.entry`, and its value is never above the node's: who loses
    worth is pushed again, and one that has gained is put back when it comes to the front.
    """

    def __init__(self, value: EvictionValue) -> None:
        self._value = value
        self._heap: list[tuple[float, int, Node]] = []
        self._num_pushed = self._num_valid = 0

    def push(self, node: Node) -> None:
        """Add a leaf that nobody holds, or note that it may be worth less than before."""
        value = self._value(node)
        if node.entry is None or value < node.entry[1]:
            self._push(node, value)

    def worth_less(self, node: Node) -> None:
        """Note that a node may be worth less; one without an entry is not concerned."""
        if node.entry is not None:
            self.push(node)

    def pop(self) -> Node | None:
        """Take out the leaf of the smallest value."""
        while self._heap:
            value, number, node = heapq.heappop(self._heap)
            if not _is_valid((value, number, node)):
                continue
            node.entry = None
            self._num_valid -= 1
            if node.lock_count or node.children or not node.pages:
                continue  # is pushed again when that changes
            if (now := self._value(node)) <= value:
                return node
            self._push(node, now)
        return None

    def _push(self, node: Node, value: float) -> None:
        self._num_pushed += 1
        self._num_valid += node.entry is None
        node.entry = self._num_pushed, value
        heapq.heappush(self._heap, (value, self._num_pushed, node))
        if len(self._heap) > 2 * self._num_valid + 64:  # more than half are stale: pay for it by the pushes
            self._heap = [entry for entry in self._heap if _is_valid(entry)]
            heapq.heapify(self._heap)


def _is_valid(entry: tuple[float, int, Node]) -> bool:
    _, number, node = entry
    return node.entry is not None and node.entry[0] == number
