"""Token ids for texts that have only a name and a length: equal names, equal tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol


class TokenSource(Protocol):
    """Makes the tokens of a text."""

    def text(self, key: str, length: int) -> list[int]:
        """The tokens of the text of that name; not to be changed."""
        ...


def _number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")


class AbstractTokens:
    """Consecutive numbers from a place of the text's own: cheap, and no two texts have a token in common."""

    def __init__(self) -> None:
        self.text = lru_cache(maxsize=256)(self._text)

    @staticmethod
    def _text(key: str, length: int) -> list[int]:
        start = _number(key) << 20
        return list(range(start, start + length))


class VocabularyTokens:
    """Random tokens of a real vocabulary.

    Args:
        ids: To choose from.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids
        self.text = lru_cache(maxsize=256)(self._text)

    def _text(self, key: str, length: int) -> list[int]:
        return random.Random(_number(key)).choices(self._ids, k=length)
