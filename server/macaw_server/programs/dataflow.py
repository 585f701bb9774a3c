"""How outcomes spread through a graph: which variables have one, and what follows from a new one.

Knows nothing of time, events or the engine: every change gives back its effects, in the order in which they
happen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from macaw.errors import MacawError, UpstreamFailedError
from macaw.protocol import Call, Variable

from .graph import Graph

MAX_TRANSFORMED_CHARS = 2**25
"""What all transforms of a program may write together: without it, a small body that copies a long text many times
fills the memory and stalls everybody."""


class Failure(NamedTuple):
    """The outcome of a variable that will never have a value.

    Attributes:
        error: The error of the step that should have made it.
        root: What went wrong first, as a sentence that names the step where it did.
    """

    error: MacawError
    root: str


Outcome = str | Failure


class VariableSettled(NamedTuple):
    """A step or the client has produced a variable, or failed to."""

    name: str
    outcome: Outcome


class CallReady(NamedTuple):
    """All inputs of a call have values."""

    call_id: str


class CallDoomed(NamedTuple):
    """An input of a call will never have a value."""

    call_id: str
    error: MacawError


Effect = VariableSettled | CallReady | CallDoomed


@dataclass(slots=True)
class Dataflow:
    """Outcomes of the variables of a graph. Transforms run in here; calls are up to the caller.

    Attributes:
        graph: May grow; what is new is brought in by `add`.
        outcomes: Of every variable that has one, in the order in which they came.
    """

    graph: Graph
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    _rank: dict[str, int] = field(default_factory=dict)
    _missing: dict[str, int] = field(default_factory=dict)  # inputs without outcome, of each waiting step
    _num_transformed: int = 0  # characters that transforms have written

    def add(self, variables: dict[str, Variable], step_ids: list[str]) -> list[Effect]:
        """Bring new variables and steps (producers before consumers) to life.

        The values that the client sends along have no effect of their own: the client knows them.
        """
        for name, variable in variables.items():
            if variable.value is not None:
                self._record(name, variable.value)
        inputs = {step_id: self.graph.inputs[step_id] for step_id in step_ids}
        for step_id, names in inputs.items():
            self._missing[step_id] = sum(name not in self.outcomes for name in names)
        effects: list[Effect] = []
        for step_id, names in inputs.items():
            if step_id not in self._missing:  # a new producer has just started or failed it
                continue
            outcomes = (self.outcomes.get(name) for name in names)
            failure = next((outcome for outcome in outcomes if isinstance(outcome, Failure)), None)
            if failure is not None or self._missing[step_id] == 0:
                settled = self._leave(step_id, failure, effects)
                effects += self._spread(settled)
        return effects

    def settle(self, name: str, outcome: Outcome) -> list[Effect]:
        """Give a variable its outcome, once."""
        assert name not in self.outcomes, f"{name!r} is settled twice"
        return self._spread([(name, outcome)])

    def values(self, names: Iterable[str]) -> dict[str, str]:
        """The values of those of `names` that have one."""
        return {name: value for name in names if isinstance(value := self.outcomes.get(name), str)}

    def critical_path(self, targets: Iterable[str]) -> list[str]:
        """The calls that determined when the last of `targets` came, first to last; all must have values.

        Goes back through the input that came last. A client's value is passed over for what a step has
        made: the client may have made it from just that, as an agent's tools do.
        """
        path: list[str] = []
        names = list(targets)
        while names:
            last = max(names, key=lambda name: (self.graph.producers[name] is not None, self._rank[name]))
            step_id = self.graph.producers[last]
            if step_id is None:
                break
            if isinstance(self.graph.steps[step_id], Call):
                path.append(step_id)
            names = self.graph.inputs[step_id]
        return path[::-1]

    def _spread(self, settled: list[tuple[str, Outcome]]) -> list[Effect]:
        effects: list[Effect] = []
        queue = deque(settled)
        while queue:
            name, outcome = queue.popleft()
            self._record(name, outcome)
            failure = outcome if isinstance(outcome, Failure) else None
            effects.append(VariableSettled(name, outcome))
            for step_id in self.graph.consumers[name]:
                if step_id not in self._missing:
                    continue
                self._missing[step_id] -= 1
                if failure is not None or self._missing[step_id] == 0:
                    queue += self._leave(step_id, failure, effects)
        return effects

    def _leave(self, step_id: str, failure: Failure | None, effects: list[Effect]) -> list[tuple[str, Outcome]]:
        """A step stops waiting: it can start, or never will. Returns what that settles at once."""
        del self._missing[step_id]
        step = self.graph.steps[step_id]
        if failure is not None:
            error = UpstreamFailedError(failure.root)
            if isinstance(step, Call):
                effects.append(CallDoomed(step_id, error))
            return [(step.output, Failure(error, failure.root))]
        if isinstance(step, Call):
            effects.append(CallReady(step_id))
            return []
        values = self.values(step.inputs)
        try:
            return [(step.output, self._transformed(step_id, [values[name] for name in step.inputs]))]
        except ValueError as e:
            root = f"Transform {step_id!r} ({step.op}) failed: {e}"
            return [(step.output, Failure(UpstreamFailedError(root), root))]

    def _transformed(self, step_id: str, values: list[str]) -> str:
        limit = f"the limit of {MAX_TRANSFORMED_CHARS:,} characters that a program's transforms may write together"
        if self._num_transformed >= MAX_TRANSFORMED_CHARS:
            raise ValueError(f"{limit} was reached before")
        text = self.graph.functions[step_id](values)
        self._num_transformed += len(text)
        if self._num_transformed > MAX_TRANSFORMED_CHARS:
            raise ValueError(f"its {len(text):,} characters go over {limit}")
        return text

    def _record(self, name: str, outcome: Outcome) -> None:
        self._rank[name] = len(self._rank)
        self.outcomes[name] = outcome
