"""A plan: one program, and the answers of its calls as they come in, found by the requests that ask for them."""

from __future__ import annotations

import json
import threading
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from macaw.protocol import (
    AnyEvent,
    CallCompleted,
    CallDelta,
    CallFailed,
    CallTimings,
    ProgramCreated,
    ProgramFailed,
    ProgramRequest,
    TextPart,
    VariablePart,
)
from macaw.replay import ABANDONED, Replay

Parts = tuple[TextPart | VariablePart, ...]

_NOT_IN_KEY = ("stream", "stream_options", "macaw")  # how the answer travels and what it is for, not what it is


def request_key(body: Mapping[str, Any], values: Mapping[str, str] | None = None) -> str:
    """The identity of a request: its whole body, canonically, with `values` in place of variables.

    Raises:
        KeyError: A variable has no value.
    """

    def text_of(parts: Any) -> str:
        return "".join(p.text if isinstance(p, TextPart) else (values or {})[p.variable] for p in parts.parts)

    body = {name: value for name, value in body.items() if name not in _NOT_IN_KEY}
    return json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=text_of)


@dataclass(frozen=True, slots=True)
class Text:
    """A string with variables in it, in the place of a string."""

    parts: Parts


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A call of the program: its id, its output variable, the request that native code will make.

    Attributes:
        body: What `openai`'s client will post, with `Text` where it is not known yet.
        variables: Names of the variables in it.
    """

    id: str
    output: str
    body: dict[str, Any]
    variables: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Join:
    """The texts that are not blank, stripped, with `separator` between; as `PromptHelper.repack` joins."""

    output: str
    inputs: tuple[str, ...]
    separator: str

    def value(self, values: Mapping[str, str]) -> str:
        """The output, once the inputs are known."""
        stripped = [values[name].strip() for name in self.inputs]
        return self.separator.join(text for text in stripped if text)


class Plan:
    """One program and its replay table. Written by the reader of the program's stream, read by native code.

    Args:
        request: The program.
        calls: Its calls, in the order of the request.
        joins: Its transforms.

    Attributes:
        program_id: As soon as the server has given one.
        closed: It was given up before every call had its answer.
    """

    def __init__(self, request: ProgramRequest, calls: Sequence[PlannedCall], joins: Sequence[Join] = ()) -> None:
        self.request = request
        self.program_id: str | None = None
        self.closed = False
        self._lock = threading.RLock()  # reentrant: a garbage collection may close a stream while it is held
        self._calls = {call.id: call for call in calls}
        self._replays = {call.id: Replay() for call in calls}
        self._joins = {join.output: join for join in joins}
        self._values: dict[str, str] = {}
        self._missing: dict[str, int] = {}
        self._consumers: dict[str, list[PlannedCall | Join]] = defaultdict(list)
        self._by_key: dict[str, deque[PlannedCall]] = defaultdict(deque)
        self._taken: list[PlannedCall] = []
        consumers: list[PlannedCall | Join] = [*joins, *calls]
        for consumer in consumers:
            inputs = set(consumer.inputs) if isinstance(consumer, Join) else consumer.variables
            self._missing[consumer.output] = len(inputs)
            for variable in inputs:
                self._consumers[variable].append(consumer)
            if isinstance(consumer, PlannedCall) and not inputs:
                self._publish(consumer)

    @property
    def num_calls(self) -> int:
        """Calls of the program."""
        return len(self._calls)

    @property
    def ended(self) -> bool:
        """Whether every call has its answer, its failure, or no chance to get one."""
        return all(replay.ended for replay in self._replays.values())

    @property
    def answers(self) -> list[str]:
        """The texts of what was answered from here, in the order in which it was asked for."""
        return [self._values[call.output] for call in self._taken if call.output in self._values]

    def ready_keys(self) -> list[str]:
        """The requests that would be answered from here now."""
        with self._lock:
            return [key for key, calls in self._by_key.items() if calls]

    def holds_all(self, keys: Sequence[str]) -> bool:
        """Whether all of these requests would be answered from here now."""
        with self._lock:
            return not self.closed and all(self._by_key.get(key) for key in keys)

    def take(self, key: str) -> Replay | None:
        """The answer to a request, for whoever asks first; None if it is not (or no longer) planned."""
        with self._lock:
            calls = self._by_key.get(key)
            if not calls:
                return None
            self._taken.append(calls.popleft())
            return self._replays[self._taken[-1].id]

    def feed(self, event: AnyEvent) -> None:
        """Take in an event of the program's stream."""
        match event:
            case ProgramCreated():
                self.program_id = event.program_id
            case CallCompleted():
                # Consumers can be asked for as soon as the reader of this call has its answer: publish them first.
                self._resolve(self._calls[event.call_id].output, answer_text(event.completion))
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
        """Give up what is missing: who waits for it gets an error, who asks later is not answered from here."""
        if self.ended:
            return
        self.closed = True
        with self._lock:
            self._by_key.clear()
        for replay in self._replays.values():
            replay.put(ABANDONED)

    def _resolve(self, variable: str, text: str) -> None:
        self._values[variable] = text
        for consumer in self._consumers.get(variable, ()):
            self._missing[consumer.output] -= 1
            if self._missing[consumer.output]:
                continue
            if isinstance(consumer, Join):
                self._resolve(consumer.output, consumer.value(self._values))
            else:
                self._publish(consumer)

    def _publish(self, call: PlannedCall) -> None:
        key = request_key(call.body, self._values)
        with self._lock:
            if not self.closed:
                self._by_key[key].append(call)


def answer_text(completion: Mapping[str, Any]) -> str:
    """The text of the first choice of a (chat) completion."""
    choice = completion["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text or ""
