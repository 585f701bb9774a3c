"""What `explain` finds: steps with verdicts, told as text and drawn as a picture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from macaw.functions.drawing import Box, Pictured

Verdict = Literal["", "call", "static", "client", "dynamic", "fails"]

_ALIKE = 6  # so many items of a map are told and drawn one by one
_NAMED = 3
_INDEX = re.compile(r"\[\d+\]")


@dataclass(eq=False, slots=True)
class Step:
    """One Runnable of the chain.

    Attributes:
        name: As in traces.
        path: Where in the chain it is.
        depth: How deep in it.
        calls: Whether it may make calls.
        verdict: `call`: sent at once; `static`: done ahead; `client`: runs natively, once; `dynamic`: planned when what
            it waits for is there; `fails`: it will raise what `why` says. Empty: it is made of other steps.
        why: The reason.
        sources: The steps that it waits for.
        call_id: Of the planned call.
    """

    name: str
    path: str
    depth: int
    calls: bool
    verdict: Verdict = ""
    why: str = ""
    sources: list[Step] = field(default_factory=list)
    call_id: str = ""

    @property
    def label(self) -> str:
        """Its call, or its name and where it is."""
        return self.call_id or (f"{self.name} in {self.path}" if self.path else self.name)

    @property
    def kind(self) -> tuple[str, str, int, Verdict]:
        """What is the same for the same step of every item of a map."""
        return self.name, _INDEX.sub("[]", self.path), self.depth, self.verdict

    def names_of_sources(self) -> str:
        """What it waits for, in words."""
        names = [source.label for source in self.sources]
        return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")

    @property
    def drawn(self) -> bool:
        """Whether the picture has it."""
        return self.verdict in ("call", "client", "fails") or (self.verdict == "dynamic" and self.calls)


@dataclass(frozen=True, repr=False)
class Explanation(Pictured):
    """The steps of a chain, in the order in which they were read; a notebook shows it as a picture.

    What is known only later is dashed there.
    """

    steps: list[Step]

    @property
    def num_calls(self) -> int:
        """Calls that are sent at once."""
        return sum(step.verdict == "call" for step in self.steps)

    def __str__(self) -> str:
        width = max(2 * step.depth + len(step.name) for step in self.steps)
        lines = [self._summary()]
        alike = Counter(step.kind for step in self.steps)
        told = set()
        for step in self.steps:
            number = alike[step.kind]
            if number > _ALIKE:
                if step.kind in told:
                    continue
                told.add(step.kind)
            name = "  " * step.depth + step.name
            why = f"{number} x {step.why}" if number > _ALIKE else step.why
            lines.append(f"{name:{width}}  {step.verdict:7}  {why}".rstrip())
        return "\n".join(lines)

    __repr__ = __str__

    def _summary(self) -> str:
        found = Counter(step.verdict for step in self.steps)
        parts = [f"{_number(self.num_calls, 'call')} sent at once"]
        if later := sum(step.calls for step in self.steps if step.verdict == "dynamic"):
            parts.append(f"{_number(later, 'step')} with calls to come later")
        if found["client"]:
            parts.append(_number(found["client"], "client step"))
        if found["fails"]:
            parts.append(f"{_number(found['fails'], 'step')} that will fail")
        return ", ".join(parts) + "."

    def _boxes(self) -> list[Box]:
        """Boxes with their sources; those of a wide map are one."""
        drawn = [step for step in self.steps if step.drawn]
        alike = Counter(step.kind for step in drawn)
        boxes: list[Box] = []
        places: dict[object, int] = {}
        for step in drawn:
            number = alike[step.kind]
            key: object = step.kind if number > _ALIKE else step
            if key not in places:
                places[key] = len(boxes)
                boxes.append(_box(step, number))
            place = places[step] = places[key]
            sources = boxes[place].sources
            sources += [i for i in dict.fromkeys(_places(step, places)) if i < place and i not in sources]
        return boxes


def _places(step: Step, places: dict[object, int]) -> Iterator[int]:
    """Where the steps are that it waits for, or what those wait for if they are not drawn."""
    for source in step.sources:
        if source in places:
            yield places[source]
        else:
            yield from _places(source, places)


def _box(step: Step, number: int) -> Box:
    kind = "step" if step.verdict == "client" or not step.calls else "call"
    state = {"dynamic": "waiting", "fails": "failed"}.get(step.verdict, "done")
    if number > _ALIKE:
        return Box(f"{number} x {step.name}", _INDEX.sub("[]", step.path), kind, state)
    return Box(step.name, step.call_id or step.path or step.verdict, kind, state)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
