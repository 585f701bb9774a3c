"""The sequences that could be admitted, in policy order."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from macaw_server.scheduler.policy import Key, Policy
from macaw_server.scheduler.types import Sequence

_Entry = tuple[Key, int, int, Sequence]  # key, number of the sequence, ticket


class WaitingQueue:
    """A priority queue with lanes and ageing: O(log n) per operation, amortized.

    A lane has two heaps of all its sequences, by the policy's key and by when they are due. Being due needs no new
    keys: the front is the sequence that has been due for longest, if any is, else the first by key. Keys and ranks of
    lanes only rise, so a stored one is a lower bound, checked when it comes to the front. Removal is lazy: each push
    draws a ticket, and an entry whose ticket is no longer valid is skipped.

    Critical sequences are kept apart from the others, so that they can be asked for alone.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._critical, self._others = _Lanes(policy), _Lanes(policy)

    def __len__(self) -> int:
        return len(self._critical) + len(self._others)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that is not in the queue."""
        self._policy.enter(sequence)
        self._lanes_of(sequence).push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        self._lanes_of(sequence).remove(sequence)
        self._policy.leave(sequence)

    def first(self, now_s: float, *, yielding: bool = True) -> Sequence | None:
        """The sequence that goes first at this moment; it stays in the queue.

        Args:
            now_s: On the scheduler's clock.
            yielding: Whether those count that give way to critical sequences: others that are not due.
        """
        if not len(self):
            return None
        critical, other = self._critical.first(now_s), self._others.first(now_s)
        if other is not None and not yielding and now_s <= self._policy.due_s(other):
            other = None
        if critical is None or other is None:
            return critical or other
        return min(critical, other, key=lambda sequence: self._policy.order(sequence, now_s))

    def _lanes_of(self, sequence: Sequence) -> _Lanes:
        return self._critical if self._policy.is_critical(sequence) else self._others


@dataclass(slots=True)
class _Lane:
    """See `WaitingQueue`."""

    by_key: list[_Entry] = field(default_factory=list)
    by_due: list[_Entry] = field(default_factory=list)
    tickets: dict[int, int] = field(default_factory=dict)  # by the sequences' numbers

    def valid(self, entry: _Entry) -> bool:
        return self.tickets.get(entry[1]) == entry[2]


class _Lanes:
    """The lanes of one half of the queue."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._lanes: dict[str, _Lane] = {}
        self._by_rank: list[tuple[float, str]] = []  # every lane once
        self._num_waiting = self._num_pushed = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, sequence: Sequence) -> None:
        name = self._policy.lane(sequence)
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = _Lane()
            heapq.heappush(self._by_rank, (self._policy.lane_rank(name), name))
        self._num_pushed += 1
        self._num_waiting += 1
        lane.tickets[sequence.number] = self._num_pushed
        for heap, key in ((lane.by_key, self._policy.key(sequence)), (lane.by_due, (self._policy.due_s(sequence),))):
            heapq.heappush(heap, (key, sequence.number, self._num_pushed, sequence))

    def remove(self, sequence: Sequence) -> None:
        lane = self._lanes[self._policy.lane(sequence)]
        del lane.tickets[sequence.number]
        self._num_waiting -= 1
        for heap in (lane.by_key, lane.by_due):
            if len(heap) > 2 * len(lane.tickets) + 64:  # more than half are stale: pay for it by the removals
                heap[:] = filter(lane.valid, heap)
                heapq.heapify(heap)

    def first(self, now_s: float) -> Sequence | None:
        while self._by_rank:
            rank, name = self._by_rank[0]
            lane = self._lanes[name]
            if not lane.tickets:
                heapq.heappop(self._by_rank)
                del self._lanes[name]
            elif (now := self._policy.lane_rank(name)) > rank:
                heapq.heapreplace(self._by_rank, (now, name))
            else:
                return self._first_of(lane, now_s)
        return None

    def _first_of(self, lane: _Lane, now_s: float) -> Sequence:
        for heap in (lane.by_key, lane.by_due):
            while not lane.valid(heap[0]):
                heapq.heappop(heap)
        oldest = lane.by_due[0][-1]
        if now_s > self._policy.due_s(oldest):
            return oldest
        while True:
            key, number, ticket, sequence = lane.by_key[0]
            if not lane.valid(lane.by_key[0]):
                heapq.heappop(lane.by_key)
            elif (now := self._policy.key(sequence)) > key:
                heapq.heapreplace(lane.by_key, (now, number, ticket, sequence))
            else:
                return sequence
