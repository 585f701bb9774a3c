"""From the tokens of one answer to text, piece by piece, in time linear in the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .rendering import Tokenizer
from .stop_strings import StopStrings

_REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""
_CONTEXT = 8
"""Tokens kept where the window is cut inside a character: each has at least a byte, a character at most 4."""
_MAX_PROMPT_CONTEXT = 64


class DetokenizedText(NamedTuple):
    """New text, and the stop string before which the answer ends, if it does."""

    delta: str
    stopped_by: str | None


class TokenText(NamedTuple):
    """A single token for a log-probability report; `bytes` is exact also for a piece of a character."""

    text: str
    bytes: list[int]


class Detokenizer:
    """Streams the text of an answer: all deltas together are what it adds to the prompt when decoded at once.

    Each token is decoded in a window of those just before it, because its text depends on them (a leading
    space, the first bytes of a character). Held back are unfinished characters and what may be the start of a
    stop string. A decoder that falls back to bytes (``<0x80>``) gives up a whole run of them for one invalid
    byte; there, and there only, the text streamed so far is kept although decoding at once would give up on
    it too.

    Args:
        tokenizer: The model's.
        prompt_ids: The prompt; its last tokens are the first window.
        stop: The text is cut before the first of these that comes up, and the rest is dropped.
        skip_special_tokens: Special tokens have no text.
        hidden: Where given, these tokens have no text, and all others have.

    Attributes:
        num_tokens: Tokens consumed: up to and with the one that completed a stop string.
        stopped_by: The stop string that was found.
    """

    __slots__ = (
        "_anchor",
        "_chunk_start",
        "_hidden",
        "_num_released",
        "_skip_special_tokens",
        "_stop_strings",
        "_text",
        "_tokenizer",
        "_window",
        "num_tokens",
        "stopped_by",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        hidden: frozenset[int] | None = None,
    ) -> None:
        self.num_tokens = 0
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._hidden = hidden
        self._stop_strings = StopStrings(stop)
        self._anchor: list[int] | None = None
        self._window, self._text = self._prompt_window(prompt_ids)
        self._num_released = len(self._text)  # characters of `_text`, the window's, that are out (or the prompt's)
        self._chunk_start = len(self._window)  # tokens before it are context: all of their text is out

    def add(self, token_ids: Sequence[int]) -> DetokenizedText:
        """Decode the next tokens. After a stop string nothing more comes."""
        pieces = []
        for token_id in token_ids:
            if self.stopped_by is not None:
                break
            self.num_tokens += 1
            text, self.stopped_by = self._stop_strings.add(self._decode_next(token_id))
            pieces.append(text)
        return DetokenizedText("".join(pieces), self.stopped_by)

    def flush(self) -> str:
        """The answer has ended: the text that was held back."""
        if self.stopped_by is not None:
            return ""
        text, self.stopped_by = self._stop_strings.add(self._text[self._num_released :])
        self._num_released = len(self._text)
        return text if self.stopped_by is not None else text + self._stop_strings.flush()

    def token_text(self, token_id: int) -> TokenText:
        """The text of one token inside a text, special tokens included."""
        if self._anchor is None:
            self._anchor = self._tokenizer.encode("a", add_special_tokens=False)
        anchor = self._tokenizer.decode(self._anchor, skip_special_tokens=False)
        text = self._tokenizer.decode([*self._anchor, token_id], skip_special_tokens=False)[len(anchor) :]
        raw = _raw_bytes(self._tokenizer.convert_ids_to_tokens(token_id)) if _REPLACEMENT in text else None
        return TokenText(text, list(text.encode() if raw is None else raw))

    def _decode_next(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._text and self._has_no_text(token_id):
            self._window.pop()
            return ""
        num_held = len(text) - len(text.rstrip(_REPLACEMENT))
        num_tokens_held = len(self._window) - self._chunk_start
        if num_tokens_held > _CONTEXT:  # more than any character has: invalid bytes, and only their end may change
            num_held = min(num_held, 3)
        delta = text[self._num_released : len(text) - num_held]
        self._num_released = max(self._num_released, len(text) - num_held)
        self._text = text
        if num_held == 0:
            self._cut(self._chunk_start)
            self._num_released, self._chunk_start = len(self._text), len(self._window)
        elif num_tokens_held > 2 * _CONTEXT:
            self._cut_inside_chunk()
        return delta

    def _cut(self, start: int) -> None:
        self._window = self._window[start:]
        self._text = self._decode(self._window)

    def _cut_inside_chunk(self) -> None:
        """Bound the window when no token has ended with a character: keep what decodes to the same end."""
        num_unreleased = len(self._text) - self._num_released
        end = self._text[-num_unreleased - 1 :]
        if self._decode(self._window[-_CONTEXT:]).endswith(end):
            self._cut(len(self._window) - _CONTEXT)
            self._num_released, self._chunk_start = len(self._text) - num_unreleased, 0

    def _has_no_text(self, token_id: int) -> bool:
        """Of a token that left the window's text as it is: whether it is so for good.

        A skipped special token is; so is any other (an id that only pads the vocabulary) after a finished
        character, where the token is not a leading space that the decoder drops.
        """
        if self._text and not self._text.endswith(_REPLACEMENT):
            return True
        return bool(self._tokenizer.decode([token_id], skip_special_tokens=False)) and not self._decode([token_id])

    def _decode(self, token_ids: list[int]) -> str:
        if self._hidden is not None:
            shown = [token_id for token_id in token_ids if token_id not in self._hidden]
            return self._tokenizer.decode(shown, skip_special_tokens=False)
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _prompt_window(self, prompt_ids: Sequence[int]) -> tuple[list[int], str]:
        """The end of the prompt, from a token on at which a character starts, where there is one."""
        length = _CONTEXT
        while True:
            window = list(prompt_ids[-length:])
            text = self._decode(window)
            if (text and _REPLACEMENT not in text) or length >= min(len(prompt_ids), _MAX_PROMPT_CONTEXT):
                return window, text
            length += 1 if length < _CONTEXT + 4 else length


def _raw_bytes(piece: str | None) -> bytes | None:
    """The bytes behind a vocabulary entry, of both conventions for tokens that are no whole characters."""
    if piece is None:
        return None
    if fallback := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(fallback[1])
    if all(char in _BYTE_LEVEL for char in piece):
        return bytes(_BYTE_LEVEL[char] for char in piece)
    return None


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE (GPT-2) writes a printable byte as itself, the n-th other byte as character 256 + n."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()
