"""Who waits for a prefix that another sequence computes, and how urgent that makes the other one. Pure."""

from __future__ import annotations

import heapq

from macaw_server.scheduler.policy import Order, Policy, PreemptionOrder
from macaw_server.scheduler.types import Sequence, SequenceStatus


class Followers:
    """Blocked sequences by the owner of the prefix that they wait for.

    An owner is as urgent as its *patron*, the most urgent of those that wait for it, so that nobody waits at the rank
    of another one.

    Args:
        policy: Its order says who is urgent.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._by_owner: dict[str, list[tuple[int, int, Sequence]]] = {}  # heaps by pages needed

    def block(self, sequence: Sequence, owner: Sequence, num_pages: int, now_s: float) -> None:
        """Let a sequence wait until its owner has computed so many pages."""
        sequence.status = SequenceStatus.BLOCKED
        heapq.heappush(self._by_owner.setdefault(owner.request_id, []), (num_pages, sequence.number, sequence))
        order = self._policy.order(sequence, now_s)
        if owner.patron and not sequence.is_ahead and order < self._policy.order(owner.patron, now_s):
            owner.patron = sequence

    def wake(self, owner: Sequence, num_pages: int | None = None) -> list[Sequence]:
        """Take out those that wait for so many pages of `owner`; all of them if it is gone."""
        followers = self._by_owner.get(owner.request_id)
        if followers is None:
            return []
        awake = []
        while followers and (num_pages is None or followers[0][0] <= num_pages):
            follower = heapq.heappop(followers)[-1]
            owner.patron = None if owner.patron is follower else owner.patron
            if follower.status is SequenceStatus.BLOCKED:
                follower.status = SequenceStatus.WAITING
                awake.append(follower)
        if not followers:
            del self._by_owner[owner.request_id]
        return awake

    def num_wanted(self, owner: Sequence) -> int:
        """Pages of `owner` from the front that somebody waits for."""
        return max((num_pages for num_pages, _ in self._of(owner)), default=0)

    def patron(self, owner: Sequence, now_s: float) -> Sequence | None:
        """The most urgent one; sought anew only when the last one has gone, for there may be thousands."""
        if owner.request_id not in self._by_owner:
            owner.patron = None
        elif owner.patron is None or owner.patron.status is not SequenceStatus.BLOCKED:
            waiting = (follower for _, follower in self._of(owner) if not follower.is_ahead)
            owner.patron = min(waiting, key=lambda follower: self._policy.order(follower, now_s), default=None)
        return owner.patron

    def order(self, sequence: Sequence, now_s: float) -> Order:
        """A sequence's place among those that run: its own, or its patron's."""
        patron, own = self.patron(sequence, now_s), self._policy.order(sequence, now_s)
        return own if patron is None else min(own, self._policy.order(patron, now_s))

    def preemption_order(self, sequence: Sequence, now_s: float) -> PreemptionOrder:
        """The same for who loses its pages first."""
        patron, own = self.patron(sequence, now_s), self._policy.preemption_order(sequence, now_s)
        return own if patron is None else min(own, self._policy.preemption_order(patron, now_s))

    def _of(self, owner: Sequence) -> list[tuple[int, Sequence]]:
        followers = self._by_owner.get(owner.request_id, ())
        return [(num_pages, s) for num_pages, _, s in followers if s.status is SequenceStatus.BLOCKED]
