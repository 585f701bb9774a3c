"""Splitting text once: what lowering has packed into prompts is not packed again when native code does the same.

LlamaIndex counts the tokens of every word when it packs chunks into prompts; for a tree of 16 leaves that takes
longer than a round trip.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from llama_index.core.indices.prompt_helper import PromptHelper


class Splits:
    """Results of splitting text; each is handed out once, so that callbacks see as much splitting as without.

    Attributes:
        recording: Keep what is split; else hand it out.
    """

    def __init__(self) -> None:
        self.recording = True
        self._kept: defaultdict[tuple[Any, ...], deque[list[str]]] = defaultdict(deque)

    def split(self, key: tuple[Any, ...], split: Callable[[], list[str]]) -> list[str]:
        """The result kept under `key`, or that of `split`."""
        if not self.recording:
            return self._kept[key].popleft() if self._kept.get(key) else split()
        result = split()
        self._kept[key].append(list(result))
        return result


_CURRENT: ContextVar[Splits | None] = ContextVar("macaw_splits", default=None)


@contextmanager
def splitting_once() -> Iterator[Splits]:
    """Keep what is split in this context, until `recording` is set to False: then hand it out."""
    splits = Splits()
    token = _CURRENT.set(splits)
    try:
        yield splits
    finally:
        _CURRENT.reset(token)


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
    if splits is not None:
        kind = (type(splitter), splitter.chunk_size, splitter.chunk_overlap, splitter.separator)
        split_text = splitter.split_text
        vars(splitter)["split_text"] = lambda text: splits.split((*kind, text), lambda: split_text(text))
    return splitter
