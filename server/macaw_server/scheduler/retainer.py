"""What the cache is told of those who will need a prefix: calls that wait, and programs with calls to come. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from macaw_server.kvcache import KVCache
from macaw_server.scheduler.policy import Policy
from macaw_server.scheduler.types import Sequence

AHEAD_STEPS = 1.0
"""Calls until the one for which a prefix was prefilled ahead."""


class Retainer:
    """Makes claims and drops them. Does nothing where the cache evicts by recency alone.

    A sequence that waits holds a claim on what is cached of its prompt until it is admitted. At its end its program
    gets one on each part with which a call to come begins (`CallHints.reuse`), until a call that begins so is admitted,
    or the program is let go. What was prefilled ahead is held in the name of its request. Claims neither lock pages nor
    count as used: whoever needs pages gets these too, after all others.

    Args:
        kv_cache: Of the scheduler.
        policy: Its order says whose claims count less.
    """

    def __init__(self, kv_cache: KVCache, policy: Policy) -> None:
        self._cache = kv_cache
        self._policy = policy

    def waits(self, sequence: Sequence) -> None:
        """A sequence has come, or has lost its pages."""
        self._claim(sequence.request_id, sequence, self._policy.claim_steps(sequence, in_program=False))

    def admitted(self, sequence: Sequence) -> None:
        """It has its pages."""
        if self._cache.retention is not None:
            self._cache.retention.let_go(sequence.request_id)
            holder, node = sequence.request.hints.program_id, sequence.pages.node
            self._cache.retention.fulfil(holder, node, sequence.number)

    def ended(self, sequence: Sequence) -> None:
        """It came to its end, and what it has computed is in the cache."""
        hints = sequence.request.hints
        if sequence.is_ahead:
            self._claim(sequence.request_id, sequence, AHEAD_STEPS)
            return
        more = self._policy.claim_steps(sequence, in_program=True)
        for num_tokens, steps in hints.reuse:
            self._claim(hints.program_id, sequence, steps + more, num_tokens)

    def let_go(self, holders: Iterable[str]) -> None:
        """Nobody needs anything for these programs and requests any more."""
        if self._cache.retention is not None:
            for holder in holders:
                self._cache.retention.let_go(holder)

    def _claim(self, holder: str, sequence: Sequence, steps: float, num_tokens: int | None = None) -> None:
        if self._cache.retention is not None:
            token_ids = sequence.token_ids
            num_tokens = len(token_ids) if num_tokens is None else min(num_tokens, len(token_ids))
            self._cache.claim(
                holder, token_ids, sequence.request.salt, num_tokens=num_tokens, steps=steps, number=sequence.number
            )
