"""Splitting text once: what lowering has packed into prompts is not packed again when native code does the same.

LlamaIndex counts the tokens of every word when it packs chunks into prompts; for a tree of 16 leaves that takes
longer than a round trip. Lowering splits without a trace; the spans and callbacks are those of native code.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.node_parser import TokenTextSplitter


class _Merged(list[str]):
    """The result of a split, in the place of the pieces that it is made of."""


class Splits:
    """Results of splitting text.

    Attributes:
        recording: Keep what is split; else use it.
    """

    def __init__(self) -> None:
        self.recording = False
        self._kept: dict[tuple[Any, ...], list[str]] = {}

    def attach(self, splitter: TokenTextSplitter) -> None:
        """Let a splitter keep, or use, results."""
        kind = (splitter.separator, splitter.chunk_overlap)

        def record(text: str) -> list[str]:
            size, chunks = splitter.chunk_size, [text]
            if text:
                kept = self._kept.get((*kind, size, text))
                chunks = splitter._merge(splitter._split(text, size), size) if kept is None else kept
            self._kept[(*kind, size, text)] = chunks
            return list(chunks)

        def split(text: str, size: int) -> list[str]:
            kept = self._kept.get((*kind, size, text))
            return TokenTextSplitter._split(splitter, text, size) if kept is None else _Merged(kept)

        def merge(pieces: list[str], size: int) -> list[str]:
            merged = isinstance(pieces, _Merged)
            return list(pieces) if merged else TokenTextSplitter._merge(splitter, pieces, size)

        vars(splitter).update({"split_text": record} if self.recording else {"_split": split, "_merge": merge})


_CURRENT: ContextVar[Splits | None] = ContextVar("macaw_splits", default=None)


@contextmanager
def splitting_once() -> Iterator[Splits]:
    """In this context, use what was split by `planning`."""
    splits = Splits()
    token = _CURRENT.set(splits)
    try:
        yield splits
    finally:
        _CURRENT.reset(token)


@contextmanager
def planning() -> Iterator[None]:
    """Split without a trace, and keep the results for the `splitting_once` around."""
    splits = _CURRENT.get()
    if splits is None:
        with splitting_once(), planning():
            yield
        return
    before, splits.recording = splits.recording, True
    try:
        yield
    finally:
        splits.recording = before


def remembering(helper: PromptHelper) -> PromptHelper:
    """A copy of a prompt helper that splits as `splitting_once` says."""
    helper = copy.copy(helper)
    native = type(helper).get_text_splitter_given_prompt
    vars(helper)["get_text_splitter_given_prompt"] = functools.partial(get_splitter, native, helper)
    return helper


def get_splitter(native: Callable[..., Any], helper: PromptHelper, *args: Any, **kwargs: Any) -> Any:
    """``native(helper, ...)``, which is a splitter, to split as `splitting_once` says."""
    splitter = native(helper, *args, **kwargs)
    splits = _CURRENT.get()
    if splits is not None and type(splitter) is TokenTextSplitter:
        splits.attach(splitter)
    return splitter
