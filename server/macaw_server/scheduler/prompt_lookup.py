"""Draft tokens by prompt lookup: what came after the last few tokens when they came up before. Pure.

Summaries, edits, extractions and code repeat their prompt, and a table repeats itself; there the continuation of
the longest earlier match is often right, and it costs no second model (Saxena, "Prompt Lookup Decoding", 2023).
The search is that of LZ77 compressors: a hash table of short n-grams with a chain of earlier occurrences behind
each, and a copy that may overlap what it produces, so that a loop of any period is foreseen at full length.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

NGRAM = 2
"""Tokens that have to match. A single one matches nearly everywhere and foresees nearly nothing."""
MAX_MATCH = 16
"""A match this long is taken at once."""
MAX_CANDIDATES = 8
"""Occurrences, the latest first, among which the longest match is looked for."""
MAX_INDEXED = 4096
"""Tokens that one call indexes, about a millisecond of work: a long prompt must not stall its batch."""


class PromptLookup:
    """The index of one sequence: O(1) per token indexed and per proposal, an entry and a number per token."""

    __slots__ = ("_latest", "_previous")

    def __init__(self) -> None:
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram -> end of its latest occurrence
        self._previous = [0] * (NGRAM - 1)  # by end - 1: end of the occurrence before; 0 is none

    def propose(self, token_ids: Seq[int], limit: int) -> list[int]:
        """Guess the next tokens.

        Args:
            token_ids: Prompt and output so far; those of the last call and what was appended since.
            limit: Tokens wanted.

        Returns:
            `limit` tokens, or none if nothing matches (or a long prompt is not indexed yet).
        """
        self._index(token_ids)
        end = len(token_ids)
        if limit < 1 or len(self._previous) < max(end, NGRAM):
            return []
        start = self._longest_match(token_ids)
        if not start:
            return []
        found = list(token_ids[start : start + limit])
        return (found * -(-limit // len(found)))[:limit]

    def _index(self, token_ids: Seq[int]) -> None:
        done = len(self._previous)
        latest, previous = self._latest, self._previous
        new = token_ids[done - NGRAM + 1 : done + MAX_INDEXED]
        for end, ngram in enumerate(zip(*(new[i:] for i in range(NGRAM)), strict=False), done + 1):
            previous.append(latest.get(ngram, 0))
            latest[ngram] = end

    def _longest_match(self, token_ids: Seq[int]) -> int:
        """Where the best earlier occurrence of the last tokens ends, the latest among equals; 0 is nowhere."""
        end = len(token_ids)
        best, best_len = 0, 0
        candidate = self._previous[end - 1]
        for _ in range(MAX_CANDIDATES):
            if not candidate:
                break
            length = NGRAM
            while (
                length < min(candidate, MAX_MATCH) and token_ids[candidate - length - 1] == token_ids[end - length - 1]
            ):
                length += 1
            if length > best_len:
                best, best_len = candidate, length
            if length == MAX_MATCH:
                break
            candidate = self._previous[candidate - 1]
        return best
