"""The static side of a program: which step makes which variable, who reads it, and who comes before whom."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from macaw.protocol import Call, ProgramGrowth, Target, Variable

from .transforms import TransformFn
from .validation import Step, check, inputs_of


@dataclass(slots=True)
class Graph:
    """Steps (calls and transforms), variables and targets of one program. Only grows: no fact ever changes.

    Attributes:
        variables: Those that the client produces.
        steps: By id, producers before consumers. Calls and transforms share one namespace.
        targets: What the application waits for.
        target_names: Their variables.
        inputs: For every step the variables that it reads, each once.
        producers: For every variable the step that makes it; None for the client's.
        consumers: For every variable the steps that read it.
        functions: The compiled transforms.
        feeders: For every variable the calls whose answers reach it through transforms only.
        depth: For every call the number of calls before it on its longest path.
        ancestors: For every call the calls before it, as a bit mask.
        bit: The bit of each call in such a mask.
    """

    variables: dict[str, Variable] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    target_names: set[str] = field(default_factory=set)
    inputs: dict[str, list[str]] = field(default_factory=dict)
    producers: dict[str, str | None] = field(default_factory=dict)
    consumers: dict[str, list[str]] = field(default_factory=dict)
    functions: dict[str, TransformFn] = field(default_factory=dict)
    feeders: dict[str, list[str]] = field(default_factory=dict)
    depth: dict[str, int] = field(default_factory=dict)
    ancestors: dict[str, int] = field(default_factory=dict)
    bit: dict[str, int] = field(default_factory=dict)

    def extend(self, growth: ProgramGrowth, *, closed: bool, plain: bool = False) -> list[str]:
        """Check and add a part: all of it, or nothing and an `InvalidProgramError` (see `validation.check`).

        Returns:
            The new step ids, producers before consumers.
        """
        new = check(self, growth, closed=closed, plain=plain)
        self.variables |= growth.variables
        self.targets += growth.targets
        self.target_names |= {target.variable for target in growth.targets}
        self.producers |= new.producers
        self.functions |= new.functions
        for name in new.producers:
            self.consumers[name] = []
        for name in growth.variables:
            self.feeders[name] = []
        for step_id, step in new.steps.items():
            self._add(step_id, step)
        return list(new.steps)

    def feeders_of(self, step_id: str) -> list[str]:
        """The calls that a step reads from, directly or through transforms."""
        return list(dict.fromkeys(call for name in self.inputs[step_id] for call in self.feeders[name]))

    def calls_after(self, step_id: str) -> list[str]:
        """The calls that read what a step makes, directly or through transforms."""
        calls, names, seen = [], [self.steps[step_id].output], set[str]()
        while names:
            for consumer in self.consumers[names.pop()]:
                if consumer in seen:
                    continue
                seen.add(consumer)
                if isinstance(step := self.steps[consumer], Call):
                    calls.append(consumer)
                else:
                    names.append(step.output)
        return calls

    def ancestors_of(self, calls: Iterable[str]) -> int:
        """All calls before any of `calls`, as a bit mask."""
        mask = 0
        for call_id in calls:
            mask |= self.ancestors[call_id]
        return mask

    def _add(self, step_id: str, step: Step) -> None:
        self.steps[step_id] = step
        self.inputs[step_id] = inputs_of(step)
        for name in self.inputs[step_id]:
            self.consumers[name].append(step_id)
        feeders = self.feeders_of(step_id)
        if not isinstance(step, Call):
            self.feeders[step.output] = feeders
            return
        self.feeders[step.output] = [step_id]
        self.depth[step_id] = 1 + max((self.depth[call_id] for call_id in feeders), default=-1)
        self.bit[step_id] = 1 << len(self.bit)
        self.ancestors[step_id] = self.ancestors_of(feeders)
        for call_id in feeders:
            self.ancestors[step_id] |= self.bit[call_id]
