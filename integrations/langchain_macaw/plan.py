"""The plan of one run: its program, and the answers of its calls as they come in."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from langchain_macaw.sentinel import ESCAPED_SUFFIX, mustache_escape
from langchain_macaw.templates import RequestTemplate, request_key
from macaw.errors import CancelledError
from macaw.protocol import (
    AnyEvent,
    CallCompleted,
    CallDelta,
    CallFailed,
    CallTimings,
    ErrorBody,
    ProgramCreated,
    ProgramFailed,
    ProgramRequest,
)

CURRENT_PLAN: ContextVar[Plan | None] = ContextVar("macaw_plan", default=None)
"""The plan that models answer from in this context."""

CallEvent = CallDelta | CallCompleted | CallFailed

_ABANDONED = CallFailed(
    call_id="abandoned",
    error=ErrorBody(**CancelledError("The chain's run was abandoned before this answer was there.").to_wire()),
    timings=CallTimings(),
)


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A call of the program: its id, its output variable, the request that native execution will make."""

    id: str
    output: str
    template: RequestTemplate


class Replay:
    """The events of one planned call, for one reader in any thread or event loop."""

    def __init__(self) -> None:
        self.ended = False
        self._lock = threading.Lock()
        self._arrived: deque[CallEvent | None] = deque()
        self._waiter: Future[CallEvent | None] | None = None
        self._wants_deltas = True

    def skip_deltas(self) -> None:
        """Keep only the end: the reader wants the whole answer at once."""
        with self._lock:
            self._wants_deltas = False
            self._arrived = deque(event for event in self._arrived if not isinstance(event, CallDelta))

    def next(self) -> Future[CallEvent | None]:
        """The next event, as soon as it is there; None if the stream broke before this call's end."""
        future: Future[CallEvent | None] = Future()
        with self._lock:
            if self._arrived:
                future.set_result(self._arrived.popleft())
            else:
                self._waiter = future
        return future

    def put(self, event: CallEvent | None) -> None:
        """Hand an event to the reader, or keep it; nothing comes after the end."""
        with self._lock:
            if self.ended or (isinstance(event, CallDelta) and not self._wants_deltas):
                return
            self.ended = not isinstance(event, CallDelta)
            waiter, self._waiter = self._waiter, None
            if waiter is None or not waiter.set_running_or_notify_cancel():
                self._arrived.append(event)
                return
        waiter.set_result(event)


class Plan:
    """One program and its replay table. Written by the reader of the program's stream, read by the models.

    Args:
        request: The program.
        calls: Its calls, in the order of the request.

    Attributes:
        program_id: As soon as the server has given one.
        closed: The run was abandoned before every call had its answer.
    """

    def __init__(self, request: ProgramRequest, calls: Sequence[PlannedCall]) -> None:
        self.request = request
        self.program_id: str | None = None
        self.closed = False
        self._lock = threading.Lock()
        self._calls = {call.id: call for call in calls}
        self._replays = {call.id: Replay() for call in calls}
        self._values: dict[str, str] = {}
        self._missing = {call.id: len(call.template.variables) for call in calls}
        self._consumers: dict[str, list[PlannedCall]] = defaultdict(list)
        self._by_key: dict[str, deque[Replay]] = defaultdict(deque)
        for call in calls:
            for variable in call.template.variables:
                self._consumers[variable].append(call)
            if not call.template.variables:
                self._publish(call)

    @property
    def ended(self) -> bool:
        """Whether every call has its answer, its failure, or no chance to get one."""
        return all(replay.ended for replay in self._replays.values())

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
            return _abandoned()
        try:
            key = request_key(payload)
        except TypeError:  # not JSON, so it cannot have been planned
            return None
        with self._lock:
            replays = self._by_key.get(key)
            return replays.popleft() if replays else None

    def feed(self, event: AnyEvent) -> None:
        """Take in an event of the program's stream."""
        match event:
            case ProgramCreated():
                self.program_id = event.program_id
            case CallCompleted():
                # Consumers can be asked for as soon as the reader of this call has its answer: publish them
                # first.
                text = event.completion["choices"][0]["message"]["content"] or ""
                self._resolve(self._calls[event.call_id].output, text)
                self._replays[event.call_id].put(event)
            case CallDelta() | CallFailed():
                self._replays[event.call_id].put(event)
            case ProgramFailed():
                # A call that did not fail by itself was stopped together with the program.
                for call_id, replay in self._replays.items():
                    replay.put(CallFailed(call_id=call_id, error=event.error, timings=CallTimings()))
            case _:
                pass

    def end(self) -> None:
        """There will be no more events."""
        for replay in self._replays.values():
            replay.put(None)

    def close(self) -> None:
        """Give up what is missing: who waits for it gets an error."""
        if self.ended:
            return
        self.closed = True
        for replay in self._replays.values():
            replay.put(_ABANDONED)

    def _resolve(self, variable: str, text: str) -> None:
        self._values[variable] = text
        escaped = variable + ESCAPED_SUFFIX
        if escaped in self._consumers:
            self._values[escaped] = mustache_escape(text)
        for name in (variable, escaped):
            for call in self._consumers.get(name, ()):
                self._missing[call.id] -= 1
                if not self._missing[call.id]:
                    self._publish(call)

    def _publish(self, call: PlannedCall) -> None:
        key = call.template.key(self._values)
        with self._lock:
            self._by_key[key].append(self._replays[call.id])


def _abandoned() -> Replay:
    replay = Replay()
    replay.put(_ABANDONED)
    return replay
