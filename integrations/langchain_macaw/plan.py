"""The plan of one run: its program, and the answers of its calls as they come in."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_core.runnables import Runnable

from langchain_macaw.sentinel import ESCAPED_SUFFIX, mustache_escape
from langchain_macaw.templates import RequestTemplate, request_key
from macaw.protocol import (
    AnyEvent,
    Call,
    CallCompleted,
    CallDelta,
    CallFailed,
    CallTimings,
    ProgramCreated,
    ProgramFailed,
    ProgramGrowth,
    ProgramRequest,
    Target,
    Transform,
)
from macaw.replay import ABANDONED, Replay, abandoned

if TYPE_CHECKING:
    from langchain_macaw.chat_models import ChatMacaw
    from langchain_macaw.lowering import Lowering

logger = logging.getLogger(__name__)

CURRENT_PLAN: ContextVar[Plan | None] = ContextVar("macaw_plan", default=None)
"""The plan that models answer from in this context."""

Posted = ProgramRequest | ProgramGrowth


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A call of the program: its id, its output variable, the request that native execution will make."""

    id: str
    output: str
    template: RequestTemplate


class Part(NamedTuple):
    """What has become known of a program since the last time."""

    planned: list[PlannedCall]
    calls: list[Call]
    transforms: list[Transform]
    targets: list[Target]

    def body(self) -> dict[str, Any]:
        """Fields of a program, or of its growth."""
        return {"calls": self.calls, "transforms": self.transforms, "targets": self.targets}


class Plan:
    """One program and its replay table. Models read it; the program's stream and client steps add to it, in any thread.

    Args:
        lowering: Reads the chain.
        max_concurrency: LangChain's limit on calls at the same time.
        metadata: Labels for the program.

    Attributes:
        request: The program, as soon as a call is known.
        program_id: As soon as the server has given one.
        open: The server waits for more of the program.
        closed: The run was abandoned, and no model gets an answer any more.
        unfinished: When it was, the server had something left to do, or waited for more.
    """

    def __init__(self, lowering: Lowering, *, max_concurrency: int | None, metadata: dict[str, str]) -> None:
        self.request: ProgramRequest | None = None
        self.program_id: str | None = None
        self.open = False
        self.closed = False
        self.unfinished = False
        self._lowering = lowering
        self._options: dict[str, Any] = {"max_concurrency": max_concurrency, "metadata": metadata, "stream": True}
        self._lock = threading.RLock()  # reentrant, as prompts may run functions of the user's
        self._send: Callable[[Posted], None] | None = None
        self._ended = False
        self._calls: dict[str, PlannedCall] = {}
        self._replays: dict[str, Replay] = {}
        self._values: dict[str, str] = {}
        self._missing: dict[str, int] = {}
        self._consumers: dict[str, list[PlannedCall]] = defaultdict(list)
        self._by_key: dict[str, deque[Replay]] = defaultdict(deque)

    @property
    def model(self) -> ChatMacaw:
        """The model whose server gets the program; there is one with the first call."""
        assert self._lowering.model is not None
        return self._lowering.model

    @property
    def ended(self) -> bool:
        """Whether every call has its answer, its failure, or no chance to get one."""
        return all(replay.ended for replay in self._replays.values())

    # -------------------------------------------------------------------------------------------------------
    # For the run

    def read(self, lower: Callable[[Lowering], list[Any]]) -> bool:
        """Take in what is known ahead; `lower` lowers the inputs. Whether there are calls, or may be some later."""
        with self._growing():
            self._lowering.results = lower(self._lowering)
        return self.request is not None or self._lowering.may_grow

    def connect(self, send: Callable[[Posted], None]) -> None:
        """Hand the program, and later its growths, to `send`, which returns at once."""
        with self._lock:
            self._send = send
            if self.request is not None:
                send(self.request)

    def close(self) -> None:
        """The run is over. An answer that is missing will not be asked for."""
        with self._lock:
            self._send = None
            if not self.ended:
                self.abandon()

    def abandon(self) -> None:
        """Give up what is missing, and what is still to come: whoever asks for an answer gets an error."""
        with self._lock:
            self._send = None
            self.unfinished = self.unfinished or (not self._ended and (self.open or not self.ended))
            self.closed = True
            replays = [*self._replays.values()]
        for replay in replays:
            replay.put(ABANDONED)

    # -------------------------------------------------------------------------------------------------------
    # For client steps

    def expects(self, step: Runnable[Any, Any]) -> bool:
        """Whether it matters what this client step gives."""
        with self._lock:
            return self._send is not None and not self._ended and self._lowering.expects(step)

    def report(self, step: Runnable[Any, Any], runs: Iterable[tuple[Any, Any]]) -> None:
        """A client step ran: its inputs with its outputs, where an exception is no output."""
        with self._lock:
            if self.expects(step):
                with self._growing():
                    for value, output in runs:
                        if not isinstance(output, BaseException):
                            self._lowering.report(step, value, output)

    def route(self, step: Runnable[Any, Any], value: Any, runnable: Runnable[Any, Any]) -> None:
        """A client step is about to run `runnable` on `value`, in its own place."""
        with self._lock:
            if self.expects(step):
                with self._growing():
                    self._lowering.route(step, value, runnable)

    # -------------------------------------------------------------------------------------------------------
    # For models

    def holds_any(self, keys: Sequence[str]) -> bool:
        """Whether one of these requests would be answered from here."""
        with self._lock:
            return any(self._by_key.get(key) for key in keys)

    def ready_keys(self) -> list[str]:
        """The requests that would be answered from here now."""
        with self._lock:
            return [key for key, replays in self._by_key.items() if replays]

    def take(self, payload: Mapping[str, Any]) -> Replay | None:
        """The answer to a request, for whoever asks first; None if it is not (or no longer) planned.

        Branches that outlive an abandoned run are stopped here, whatever they ask for.
        """
        if self.closed:
            return abandoned()
        try:
            key = request_key(payload)
        except TypeError:  # not JSON, so it cannot have been planned
            return None
        with self._lock:
            replays = self._by_key.get(key)
            return replays.popleft() if replays else None

    # -------------------------------------------------------------------------------------------------------
    # For the reader of the program's stream

    def feed(self, event: AnyEvent) -> None:
        """Take in an event of the program's stream."""
        match event:
            case ProgramCreated():
                self.program_id = event.program_id
            case CallCompleted():
                # What follows can be asked for as soon as the reader of this call has its answer: plan it first.
                self._resolve(self._calls[event.call_id].output, event.completion["choices"][0]["message"])
                self._replays[event.call_id].put(event)
            case CallDelta() | CallFailed():
                self._replays[event.call_id].put(event)
            case ProgramFailed():
                # A call that did not fail by itself was stopped together with the program.
                for call_id, replay in self._end().items():
                    replay.put(CallFailed(call_id=call_id, error=event.error, timings=CallTimings()))
            case _:
                pass

    def lose(self, calls: Sequence[Call]) -> None:
        """The server did not take a growth with these calls."""
        with self._lock:
            self.open = not self._ended
        for call in calls:
            self._replays[call.id].put(None)

    def end(self) -> None:
        """There will be no more events."""
        for replay in self._end().values():
            replay.put(None)

    def _end(self) -> dict[str, Replay]:
        with self._lock:
            self._ended, self.open = True, False
            return dict(self._replays)

    # -------------------------------------------------------------------------------------------------------
    # Growing

    @contextmanager
    def _growing(self) -> Iterator[None]:
        """Send what becomes known in the block: a program first, and what is added to it afterwards."""
        with self._lock:
            try:
                yield
                self._post(self._lowering.drain())
            except Exception as error:
                if self._send is None:
                    raise
                logger.warning("Planning stopped with %r. What it did not come to are ordinary requests.", error)

    def _post(self, part: Part | None) -> None:
        may_grow = self._lowering.may_grow
        if self._ended or not (part or (self.open and not may_grow)):
            return
        body = part.body() if part else {}
        post: Posted
        if self.request is None:
            post = self.request = ProgramRequest(**body, **self._options, open=may_grow)
        elif self.open:
            post = ProgramGrowth(**body, close=not may_grow)
        else:
            return  # nothing was to come; what came all the same is asked for by ordinary requests
        self.open = may_grow
        self._add(part.planned if part else [])
        if self._send:
            self._send(post)

    def _add(self, planned: Sequence[PlannedCall]) -> None:
        for call in planned:
            self._calls[call.id] = call
            self._replays[call.id] = Replay()
            missing = [name for name in call.template.variables if self._value(name) is None]
            self._missing[call.id] = len(missing)
            for variable in missing:
                self._consumers[variable].append(call)
            if not missing:
                self._publish(call)

    def _resolve(self, variable: str, message: Mapping[str, Any]) -> None:
        with self._growing():
            self._values[variable] = message["content"] or ""
            for name in (variable, variable + ESCAPED_SUFFIX):
                for call in self._consumers.pop(name, ()):
                    self._value(name)
                    self._missing[call.id] -= 1
                    if not self._missing[call.id]:
                        self._publish(call)
            self._lowering.answered(variable, message)

    def _value(self, name: str) -> str | None:
        """A variable's text; the escaped one is made when it is first needed."""
        if name not in self._values and name.removesuffix(ESCAPED_SUFFIX) in self._values:
            self._values[name] = mustache_escape(self._values[name.removesuffix(ESCAPED_SUFFIX)])
        return self._values.get(name)

    def _publish(self, call: PlannedCall) -> None:
        self._by_key[call.template.key(self._values)].append(self._replays[call.id])
