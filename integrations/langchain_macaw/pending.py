"""Values that become known during a run, and what is in a value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import BaseMessage

from langchain_macaw.sentinel import Answer, Deferred, Opaque, StandIns, Variable, is_symbolic

FAILS = Opaque()
"""What is never known, as native execution raises in its place."""


class Pending(Opaque):
    """A value that will be known: when a client step has run, or when something can be lowered after all.

    Attributes:
        retry: Computes the value, once what it waits for is known; None if only a report can tell.
        num_missing: How many of the things that `retry` waits for are not known yet.
        may_call: Calls may be planned when it is known.
        reported: A client step will say what it is, if nothing else does.
        known: Whether `value` is set.
    """

    __slots__ = ("known", "may_call", "num_missing", "reported", "retry", "value")

    def __init__(self, retry: Callable[[], Any] | None = None, *, may_call: bool = False) -> None:
        self.retry = retry
        self.may_call = may_call
        self.num_missing = 0
        self.reported = False
        self.known = False
        self.value: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Rendered(Deferred):
    """What `render` makes of `value`, as soon as that is known; under stand-ins before."""

    render: Callable[[Any], Any]
    value: Any


def rendered(render: Callable[[Any], Any], value: Any) -> Any:
    """`render(value)`, now or later."""
    if not is_symbolic(value):
        return render(value)

    @functools.cache  # several models may read the same prompt
    def build(stand_ins: StandIns) -> Any:
        return render(stand_ins.fill(value))

    return Rendered(build, render, value)


def unknowns(value: Any) -> Iterator[Variable | Opaque]:
    """What is not known yet in a value."""
    match value:
        case Variable() | Opaque():
            yield value
        case Answer(variable):
            yield variable
        case Rendered():
            yield from unknowns(value.value)
        case dict():
            for item in value.values():
                yield from unknowns(item)
        case list() | tuple():
            for item in value:
                yield from unknowns(item)


def may_be(value: Any, actual: Any, texts: Mapping[str, str]) -> bool:
    """Whether `actual` can be what a lowered value has become, given the texts of the variables so far."""
    match value:
        case Variable(name):
            return name in texts and bool(actual == texts[name])
        case Answer(Variable(name)):
            return name in texts and isinstance(actual, BaseMessage) and actual.text == texts[name]
        case Pending(known=True):
            return may_be(value.value, actual, texts)
        case Opaque() | Deferred():
            return True
        case dict() if isinstance(actual, dict):
            return value.keys() == actual.keys() and all(may_be(value[k], actual[k], texts) for k in value)
        case list() if isinstance(actual, list) and len(value) == len(actual):
            return all(may_be(*pair, texts) for pair in zip(value, actual, strict=True))
    try:
        return value is actual or bool(value == actual)
    except Exception:  # an array has no truth value
        return False
