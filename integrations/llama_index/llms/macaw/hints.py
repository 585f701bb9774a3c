"""Hints: what a request belongs to, read from LlamaIndex's own instrumentation.

LlamaIndex runs everything of note in *spans*: a query, a synthesizer's `get_response`, a workflow's run and each of
its steps. A handler on the root dispatcher keeps who is whose parent. Where a request is made, its ancestors say

- `app`: the workflow run, by its id, else the nearest ``*.run`` ancestor, else the outermost one;
- `group`: requests with the same parent that are under way at the same time. The parent is the nearest ancestor that
  is neither a model nor a worker of `run_jobs`; for a step of a workflow it is that step of the run, however often it
  runs. Requests that follow each other are no group;
- `stage`: how many requests of the application, one after the other, ended before this one.

An asynchronous request waits for one turn of the event loop, in which those that are started together count each
other. A request outside of any span has no hints.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.instrumentation.span import BaseSpan, active_span_id
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index_instrumentation import root_dispatcher
from llama_index_instrumentation.dispatcher import active_instrument_tags

logger = logging.getLogger(__name__)

_MAX_LEN = 256  # of a name in the protocol
_UUID_LEN = len("-00000000-0000-0000-0000-000000000000")
_RUN_ID_TAG = "llamaindex.run_id"


class Scope(BaseSpan):
    """An open span.

    Attributes:
        parent: The span around it.
        is_model: It is a method of a model.
        stage: How many requests below it have ended, one after the other.
    """

    parent: Scope | None = None
    is_model: bool = False
    stage: int = 0

    @property
    def name(self) -> str:
        """Class and method, without the id."""
        return self.id_[:-_UUID_LEN]

    @property
    def is_run(self) -> bool:
        """It is the run of a workflow or a pipeline."""
        return self.name.endswith(".run")


class ScopeHandler(BaseSpanHandler[Scope]):
    """Keeps the open spans, and nothing of what is in them."""

    @classmethod
    def class_name(cls) -> str:
        """The handler's name."""
        return "MacawScopeHandler"

    def new_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any = None,
        parent_span_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Scope:
        """A span has begun."""
        parent = self.open_spans.get(parent_span_id) if parent_span_id else None
        return Scope(id_=id_, parent_id=parent_span_id, parent=parent, is_model=isinstance(instance, BaseLLM))

    def prepare_to_exit_span(
        self, id_: str, bound_args: inspect.BoundArguments, instance: Any = None, result: Any = None, **kwargs: Any
    ) -> Scope | None:
        """A span has ended."""
        return self.open_spans.get(id_)

    def prepare_to_drop_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any = None,
        err: BaseException | None = None,
        **kwargs: Any,
    ) -> Scope | None:
        """A span has failed."""
        return self.open_spans.get(id_)


_HANDLER = ScopeHandler()


def install() -> None:
    """Let the handler see the spans of this process, if it does not yet."""
    if not any(handler is _HANDLER for handler in root_dispatcher.span_handlers):
        root_dispatcher.add_span_handler(_HANDLER)


@dataclass(slots=True)
class _Group:
    """Requests with the same parent that are under way at the same time."""

    stage: int
    size: int = 0
    under_way: int = 0


_groups: dict[str, _Group] = {}
_lock = threading.RLock()  # reentrant: a garbage collection may close a stream while it is held


class _Place:
    """Where in the application a request is, from its start to its end."""

    def __init__(self, scope: Scope) -> None:
        ancestors = [scope]
        while (parent := ancestors[-1].parent) is not None:
            ancestors.append(parent)
        around = [scope for scope in ancestors if not scope.is_model]
        runs = [scope for scope in around if scope.is_run]
        self.app = next(iter(runs or around[-1:]), None)
        self.parent = _parent_of(around)
        if self.app is None:
            return
        with _lock:
            self.group = _groups.setdefault(self.parent, _Group(self.app.stage))
            self.group.size += 1
            self.group.under_way += 1

    def hints(self) -> dict[str, Any]:
        """The field `macaw` of the request."""
        run_id = active_instrument_tags.get().get(_RUN_ID_TAG)
        if self.app is None:
            return {"app": str(run_id)[-_MAX_LEN:]} if run_id else {}
        hints: dict[str, Any] = {"app": str(run_id or self.app.id_)[-_MAX_LEN:], "stage": self.group.stage}
        if self.group.size > 1:
            hints |= {"group": f"{self.parent}/{self.group.stage}"[-_MAX_LEN:], "group_size": self.group.size}
        return hints

    def leave(self) -> None:
        """The request has ended."""
        if self.app is None:
            return
        with _lock:
            self.app.stage = max(self.app.stage, self.group.stage + 1)
            self.group.under_way -= 1
            if not self.group.under_way:
                _groups.pop(self.parent, None)


def _parent_of(around: list[Scope]) -> str:
    """What a request is a part of, by its ancestors that are no models."""
    for scope in around:
        if scope.name == "run_jobs.<locals>.worker":
            continue
        run = scope.parent
        return f"{run.id_}/{scope.name}" if run and run.is_run else scope.id_
    return ""


@contextmanager
def hinted(enabled: bool, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of a request, with hints, while it is made.

    Args:
        enabled: Give hints.
        kwargs: The arguments. Hints that are there stay as they are.
    """
    place = _enter(enabled, kwargs)
    try:
        yield _with_hints(place, kwargs)
    finally:
        if place:
            place.leave()


@asynccontextmanager
async def ahinted(enabled: bool, kwargs: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """As `hinted`, with all requests of a group that start in the same turn of the event loop counted."""
    place = _enter(enabled, kwargs)
    try:
        if place:
            await asyncio.sleep(0)
        yield _with_hints(place, kwargs)
    finally:
        if place:
            place.leave()


def _enter(enabled: bool, kwargs: dict[str, Any]) -> _Place | None:
    if not enabled or "macaw" in (kwargs.get("extra_body") or {}):
        return None
    try:
        scope = _HANDLER.open_spans.get(active_span_id.get() or "")
        return _Place(scope) if scope else None
    except Exception as error:  # hints are worth less than the request
        logger.warning("No hints for a request: %r", error)
        return None


def _with_hints(place: _Place | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    hints = place.hints() if place else {}
    return {**kwargs, "extra_body": {**(kwargs.get("extra_body") or {}), "macaw": hints}} if hints else kwargs
