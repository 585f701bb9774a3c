"""Text of a given length in tokens, from seeds: no third-party text, and the same key is the same text."""

from __future__ import annotations

import re
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING

from macaw_server.bench.errors import BenchError
from macaw_server.workloads import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MIN_WORDS = 64


class Texts:
    """Words that are one token each for the served model, put together at random.

    Args:
        tokenizer: Of the served model.
        seed: Another seed is other text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._texts: dict[Text, str] = {}

    def __getitem__(self, part: Text) -> str:
        """The text of `part`, ``part.length`` tokens long behind other text."""
        if part not in self._texts:
            random = Random(f"{self._seed}/{part.key}")
            self._texts[part] = "".join(random.choices(self._words, k=part.length))
        return self._texts[part]

    @cached_property
    def _words(self) -> list[str]:
        """Lower-case words with a space before them that are one token."""
        found = []
        for token in sorted(self._tokenizer.get_vocab()):
            word = token.replace("\u0120", " ").replace("\u2581", " ")  # byte-level BPE's and SentencePiece's space
            if re.fullmatch(r" [a-z]{2,}", word):
                found.append(word)
        words = [word for word in found if len(self._encode(word + word)) == 2]
        if len(words) < _MIN_WORDS:
            raise BenchError(
                f"The tokenizer has {len(words)} lower-case words of one token, and {_MIN_WORDS} are needed to make "
                "text of a known length. Choose a model with an English vocabulary."
            )
        return words

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids
