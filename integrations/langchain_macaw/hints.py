"""Hints: what a request belongs to, read from LangChain's callbacks while an unchanged chain runs.

A handler follows which run is whose child. From that each request gets its `app` (the root run), its `stage` (how many
requests of the app came before it, one after the other) and, where runs are side by side, its `group`. Nothing is
written to traces, and a run is forgotten at its end.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

logger = logging.getLogger(__name__)

MAX_RUNS = 10_000
"""Runs that are followed at once. Those that never end, as an asynchronous generator that nobody closes, make way."""
OBJECTIVE = "macaw_objective"
"""Key in a run's metadata: `latency` or `throughput`, for all requests of it."""


_MODEL_RUN: ContextVar[UUID | None] = ContextVar("macaw_model_run", default=None)
"""The model's run that began last in this context: a model that streams is not told its own."""


@dataclass(slots=True, eq=False)
class _Run:
    """A run that has not ended.

    Attributes:
        id: LangChain's.
        app: The root's id.
        parent: None for a root, or if it began before runs were followed.
        stage: Requests that came before this run.
        next_stage: The same for what follows on what has ended in it.
        branches: How many children run side by side; 0 where that is not known to LangChain ahead, or none do.
        fans_out: Whether any do, as far as its kind says.
        in_sequence: It is a step of a sequence: what lives beside it only waits for it.
        superstep: LangGraph's step that it is a task of.
        sent: It is a task that LangGraph's `Send` made.
        num_live: Children that have begun and not ended.
        step: Of its own children: LangGraph's current step and its first stage.
        objective: What its metadata says.
    """

    id: UUID
    app: str
    parent: _Run | None
    stage: int
    next_stage: int
    fans_out: bool = False
    branches: int = 0
    in_sequence: bool = False
    superstep: int | None = None
    sent: bool = False
    namespace: str | None = None
    num_live: int = 0
    step: tuple[int, int] = (-1, 0)
    objective: str | None = None


class RunFollower(BaseCallbackHandler):
    """The handler. It does its little work in the caller's thread or event loop, in order."""

    run_inline = True
    ignore_retry = True
    ignore_custom_event = True

    def __init__(self) -> None:
        self._runs: OrderedDict[UUID, _Run] = OrderedDict()
        self._lock = threading.RLock()  # reentrant: a garbage collection may close a stream while it is held

    def __deepcopy__(self, memo: dict[int, Any]) -> RunFollower:
        """There is one, whoever copies a config."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return follower, ()

    def __len__(self) -> int:
        return len(self._runs)

    def __bool__(self) -> bool:
        return True

    def hints(self, run_id: UUID | None) -> dict[str, Any]:
        """The hints for a model's run; none for one that is the whole application, or is not known."""
        with self._lock:
            run = self._runs.get(run_id) if run_id else None
            if run is None or run.app == str(run_id):
                return {}
            hints: dict[str, Any] = {"app": run.app, "stage": run.stage, **_group(run)}
        return hints if run.objective is None else {**hints, "objective": run.objective}

    # -------------------------------------------------------------------------------------------------------
    # What LangChain reports

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, **facts: Any) -> None:
        """A chain begins; its kind says whether its parts run side by side."""
        run = self._begin(run_id, **facts)
        name = facts.get("name") or ""
        if name.startswith("RunnableParallel<"):
            run.fans_out = name.count(",") > 0
        elif name.startswith("RunnableEach<") and isinstance(inputs, list):
            run.branches = len(inputs)
            run.fans_out = run.branches > 1

    def on_tool_start(self, serialized: Any, input_str: str, *, run_id: UUID, **facts: Any) -> None:
        """A tool begins."""
        self._begin(run_id, **facts)

    def on_retriever_start(self, serialized: Any, query: str, *, run_id: UUID, **facts: Any) -> None:
        """A retriever begins; some ask models."""
        self._begin(run_id, **facts)

    def on_llm_start(self, serialized: Any, prompts: list[str], *, run_id: UUID, **facts: Any) -> None:
        """A model begins."""
        self._begin(run_id, **facts)
        _MODEL_RUN.set(run_id)

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: UUID, **facts: Any) -> None:
        """A chat model begins."""
        self._begin(run_id, **facts)
        _MODEL_RUN.set(run_id)

    def on_llm_end(self, response: Any, *, run_id: UUID, **_: Any) -> None:
        """A model has answered: what follows is one stage further."""
        self._end(run_id, stages=1)

    def _ended(self, *result: Any, run_id: UUID, **_: Any) -> None:
        self._end(run_id)

    on_chain_end = on_chain_error = _ended
    on_tool_end = on_tool_error = _ended
    on_retriever_end = on_retriever_error = on_llm_error = _ended

    def _begin(
        self,
        run_id: UUID,
        *,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> _Run:
        with self._lock:
            parent = self._runs.get(parent_run_id) if parent_run_id else None
            run = _Run(run_id, str(parent_run_id or run_id) if parent is None else parent.app, parent, 0, 0)
            run.in_sequence = any(tag.startswith("seq:step:") for tag in tags or ())
            if (objective := (metadata or {}).get(OBJECTIVE)) in ("latency", "throughput"):
                run.objective = objective
            _read_langgraph(run, metadata or {})
            if parent is not None:
                run.stage = run.next_stage = _first_stage(run, parent)
                parent.num_live += 1
            self._runs[run_id] = run
            if len(self._runs) > MAX_RUNS:
                self._runs.popitem(last=False)
        return run

    def _end(self, run_id: UUID, stages: int = 0) -> None:
        with self._lock:
            if (run := self._runs.pop(run_id, None)) is not None and (parent := run.parent) is not None:
                parent.num_live -= 1
                parent.next_stage = max(parent.next_stage, run.next_stage + stages)


@cache
def follower() -> RunFollower:
    """The handler of this process; from the first call on LangChain gives it to every run."""
    handler = RunFollower()
    register_configure_hook(ContextVar("macaw_run_follower", default=handler), inheritable=True)
    return handler


def with_hints(model: Any, run_manager: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A request's arguments with its hints; without any rather than with an error.

    Args:
        model: `hints` switches them off; `extra_body` is what its requests say if `kwargs` do not say otherwise. What
            the application itself says in ``extra_body["macaw"]`` has the last word.
        run_manager: Of the model's run; None where the model streams.
        kwargs: Arguments of the call.
    """
    if not model.hints:
        return kwargs
    try:
        if not (hints := follower().hints(run_manager.run_id if run_manager else _MODEL_RUN.get())):
            return kwargs
        body = dict(kwargs.get("extra_body", model.extra_body) or {})
        return {**kwargs, "extra_body": {**body, "macaw": {**hints, **body.get("macaw", {})}}}
    except Exception as error:
        logger.debug("A request goes without hints: %r", error)
        return kwargs


async def awith_hints(model: Any, run_manager: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """As `with_hints`, when tasks that were created together have all begun."""
    if model.hints:
        await asyncio.sleep(0)
    return with_hints(model, run_manager, kwargs)


def _first_stage(run: _Run, parent: _Run) -> int:
    """Where a child begins: behind what has ended in its parent, but for what only ran beside it."""
    if run.superstep is not None:
        if parent.step[0] != run.superstep:
            parent.step = run.superstep, parent.next_stage
        return parent.step[1]
    return parent.stage if parent.fans_out else parent.next_stage


def _group(run: _Run) -> dict[str, Any]:
    """The nearest run above that has more of them side by side; those of one stage are a group."""
    for child, parent in _upwards(run):
        side_by_side = child.sent or (parent.num_live > 1 and not child.in_sequence)
        if parent.fans_out or side_by_side:
            step = "" if child.superstep is None else f".{child.superstep}"
            group: dict[str, Any] = {"group": f"{parent.id}{step}/{run.stage}"}
            return group | ({"group_size": parent.branches} if parent.branches else {})
    return {}


def _upwards(run: _Run) -> Iterator[tuple[_Run, _Run]]:
    while run.parent is not None:
        yield run, run.parent
        run = run.parent


def _read_langgraph(run: _Run, metadata: Mapping[str, Any]) -> None:
    """Whether the run is a task of a graph. What runs within the task has the same metadata, as its heir."""
    run.namespace = metadata.get("langgraph_checkpoint_ns")
    if run.namespace is None or run.parent is None or run.namespace == run.parent.namespace:
        return
    run.superstep = metadata.get("langgraph_step")
    path = metadata.get("langgraph_path") or ("",)
    run.sent = path[0] == "__pregel_push"
