"""The sequences that could be admitted, in policy order."""

from __future__ import annotations

import heapq

from macaw_server.scheduler.policy import Key, Policy
from macaw_server.scheduler.types import Sequence

_Entry = tuple[Key, int, int, Sequence]  # key, number of the sequence, ticket


class WaitingQueue:
    """A priority queue with ageing: O(log n) per operation, amortized.

    Two heaps hold every sequence, one by the policy's key and one by arrival. Ageing needs no new keys:
    whoever has aged goes by arrival before the rest, so the front is the oldest sequence if that has aged,
    else the first by key. Removal is lazy: each push draws a ticket, and an entry whose ticket is no longer
    valid is skipped.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._by_key: list[_Entry] = []
        self._by_arrival: list[_Entry] = []
        self._tickets: dict[int, int] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that is not in the queue."""
        self._num_pushed += 1
        self._tickets[sequence.number] = self._num_pushed
        for heap, key in (
            (self._by_key, self._policy.key(sequence)),
            (self._by_arrival, (sequence.arrival_s,)),
        ):
            heapq.heappush(heap, (key, sequence.number, self._num_pushed, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        del self._tickets[sequence.number]
        for heap in (self._by_key, self._by_arrival):
            if len(heap) > 2 * len(self._tickets) + 64:  # more than half are stale: pay for it by the removals
                heap[:] = filter(self._valid, heap)
                heapq.heapify(heap)

    def first(self, now_s: float) -> Sequence | None:
        """The sequence that goes first at this moment; it stays in the queue."""
        for heap in (self._by_key, self._by_arrival):
            while heap and not self._valid(heap[0]):
                heapq.heappop(heap)
        if not self._tickets:
            return None
        oldest = self._by_arrival[0][-1]
        return oldest if now_s - oldest.arrival_s > self._policy.ageing_s else self._by_key[0][-1]

    def _valid(self, entry: _Entry) -> bool:
        return self._tickets.get(entry[1]) == entry[2]
