"""Whose time per token counts in a step, and who takes only what these leave. Pure."""

from __future__ import annotations

from macaw_server.scheduler.budget import LEADER_SLOWDOWN
from macaw_server.scheduler.followers import Followers
from macaw_server.scheduler.policy import Policy
from macaw_server.scheduler.types import Sequence


class Protection:
    """Chosen anew for each step.

    Args:
        policy: Says who is critical, and whether that matters.
        followers: Those that wait for a prefix make its owner as urgent as they are.
        latency_slowdown: Of critical sequences.
    """

    def __init__(self, policy: Policy, followers: Followers, latency_slowdown: float) -> None:
        self._policy = policy
        self._followers = followers
        self._latency_slowdown = latency_slowdown
        self._leader: str | None = None  # the program under protection where no critical sequence decodes

    @property
    def slowdown(self) -> float:
        """How many times longer the others may make a step."""
        return self._latency_slowdown if self._leader is None else LEADER_SLOWDOWN

    def choose(self, decodes: list[Sequence], now_s: float) -> list[Sequence]:
        """Those of the sequences that decode which are protected: the critical ones, or else the first program's."""
        self._leader = None
        if not self._policy.protects_latency or not decodes:
            return []
        critical = [sequence for sequence in decodes if self._policy.is_critical(sequence)]
        if critical:
            return critical
        first = min(decodes, key=lambda sequence: self._policy.order(sequence, now_s))
        self._leader = first.request.hints.program_id
        return [sequence for sequence in decodes if sequence.request.hints.program_id == self._leader]

    def gives_way(self, sequence: Sequence, now_s: float) -> bool:
        """Whether it takes only what those under protection leave, and so do all that wait for its prefix."""
        policy, leader = self._policy, self._leader
        if not policy.protects_latency:
            return False
        return not any(
            policy.is_critical(s)
            or now_s > policy.due_s(s)
            or (leader is not None and s.request.hints.program_id == leader)
            for s in (sequence, self._followers.patron(sequence, now_s))
            if s is not None
        )
