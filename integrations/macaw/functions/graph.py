"""What an application has built: calls and client steps, joined by semantic variables."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextvars import Context
from dataclasses import dataclass, field
from inspect import BoundArguments
from typing import TYPE_CHECKING, Any, NamedTuple

from macaw.functions.variable import Objective, SemanticVariable, Text, fail, upstream_error

if TYPE_CHECKING:
    from macaw.functions.native import NativeFunction

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.:\-/\[\]]")


@dataclass(eq=False, slots=True)
class Call:
    """One output of one call of a function.

    Attributes:
        function: The function's name.
        output: What it makes.
        turns: The prompt: (role, text) for every message; for a text completion one without a role.
        options: Other fields of OpenAI's request.
    """

    function: str
    output: SemanticVariable
    turns: list[tuple[str, Text]]
    options: dict[str, Any]

    @property
    def outputs(self) -> list[SemanticVariable]:
        """The one output."""
        return [self.output]

    @property
    def inputs(self) -> list[SemanticVariable]:
        """The variables in the prompt, each once."""
        return list(dict.fromkeys(part for part in self.parts if isinstance(part, SemanticVariable)))

    @property
    def parts(self) -> list[str | SemanticVariable]:
        """The whole prompt, without its roles."""
        return [part for _, text in self.turns for part in text]


@dataclass(eq=False, slots=True)
class ClientStep:
    """One call of a native function. `context` is the caller's, in which it will run."""

    native: NativeFunction
    arguments: BoundArguments
    outputs: list[SemanticVariable]
    context: Context

    @property
    def function(self) -> str:
        """The function's name."""
        return self.native.__name__

    @property
    def inputs(self) -> list[SemanticVariable]:
        """The variables in the arguments, each once."""
        return list(dict.fromkeys(variables_in(self.arguments.arguments)))


Node = Call | ClientStep


def variables_in(value: object) -> Iterator[SemanticVariable]:
    """The variables in an argument, also within lists, tuples and dicts."""
    if isinstance(value, SemanticVariable):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from variables_in(item)


def resolved(value: Any) -> Any:
    """An argument with the variables' values in their places; all of them are there."""
    if isinstance(value, SemanticVariable):
        return value.future.result()
    if isinstance(value, Text):
        return "".join(map(resolved, value))
    if isinstance(value, list):
        return [resolved(item) for item in value]
    if isinstance(value, tuple):
        items = [resolved(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        return {key: resolved(item) for key, item in value.items()}
    return value


class Ask(NamedTuple):
    """What the application wants of a variable; `deadline_s` is of the monotonic clock."""

    objective: Objective
    deadline_s: float | None


@dataclass(slots=True)
class Graph:
    """The nodes of a session's program, in the order in which they were built: producers before consumers.

    Threads may build at once.

    Attributes:
        nodes: All of them.
        asks: Every variable that was asked for.
    """

    nodes: list[Node] = field(default_factory=list)
    asks: dict[SemanticVariable, Ask] = field(default_factory=dict)
    _unsent: list[Node] = field(default_factory=list)
    _names: dict[SemanticVariable, str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, node: Node) -> None:
        """Add a call whose inputs were built before; it fails at once where one of these has failed."""
        for variable in node.inputs:
            variable.add_consumer(node)
            if variable.ready and (error := variable.future.exception()) is not None:
                for output in node.outputs:
                    fail(output, upstream_error(output, error))
        with self._lock:  # only now: what the driver finds unsent has failed already where an input has
            self.nodes.append(node)
            self._unsent.append(node)

    def ask(self, variable: SemanticVariable, ask: Ask) -> None:
        """Note that the application waits for a variable. The strictest wish stands."""
        with self._lock:
            old = self.asks.get(variable)
            if old is None or _strictness(ask) < _strictness(old):
                self.asks[variable] = ask

    def pending_asks(self) -> list[tuple[SemanticVariable, Ask]]:
        """What the application still waits for."""
        with self._lock:
            self.asks = {variable: ask for variable, ask in self.asks.items() if not variable.ready}
            return list(self.asks.items())

    def forget_deadlines(self, variables: Iterable[SemanticVariable]) -> None:
        """The server has been told of them."""
        with self._lock:
            for variable in variables:
                if variable in self.asks:
                    self.asks[variable] = self.asks[variable]._replace(deadline_s=None)

    def take_unsent(self) -> list[Node]:
        """What was added since the last time."""
        with self._lock:
            unsent, self._unsent = self._unsent, []
        return unsent

    def put_back(self, nodes: Iterable[Node]) -> None:
        """Let `take_unsent` give these again."""
        with self._lock:
            self._unsent = [*nodes, *self._unsent]

    def name(self, variable: SemanticVariable) -> str:
        """The variable's name on the wire: unique in the program, and recognisable in its timeline."""
        with self._lock:
            if variable not in self._names:
                name = variable.name if variable.maker is None else f"{variable.maker}.{variable.name}"
                stem = name = _NOT_IN_NAMES.sub("_", name)[:200]
                number = 1
                while name in self._taken:
                    number += 1
                    name = f"{stem}-{number}"
                self._taken.add(name)
                self._names[variable] = name
            return self._names[variable]

    def forget_settled(self) -> None:
        """Begin anew with what has no value yet, when its program has ended."""
        with self._lock:
            self.nodes = [node for node in self.nodes if not all(output.ready for output in node.outputs)]
            self._names.clear()
            self._taken.clear()

    def calls_behind(self, variable: SemanticVariable) -> list[SemanticVariable]:
        """The model's outputs that a variable waits for: itself, or those that its client steps need."""
        found: list[SemanticVariable] = []
        seen, pending = {variable}, [variable]
        while pending:
            variable = pending.pop()
            if isinstance(variable.producer, Call):
                found.append(variable)
            elif variable.producer is not None:
                new = [v for v in variable.producer.inputs if v not in seen and not v.ready]
                seen.update(new)
                pending += new
        return found


def _strictness(ask: Ask) -> tuple[bool, float]:
    return ask.objective != "latency", float("inf") if ask.deadline_s is None else ask.deadline_s
