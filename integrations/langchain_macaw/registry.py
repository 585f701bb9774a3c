"""Which Runnables are understood, and what they are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langchain_core.runnables import Runnable

if TYPE_CHECKING:
    from langchain_macaw.lowering import Lowering


@dataclass(frozen=True, slots=True)
class Scope:
    """What a Runnable gets besides its input.

    Attributes:
        path: Where in the chain it is; becomes part of its calls' ids.
        kwargs: Arguments bound to it.
        configurable: `configurable` of its config.
    """

    path: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    configurable: Mapping[str, Any] = field(default_factory=dict)

    def at(self, step: str = "") -> Scope:
        """The scope of a part of this Runnable, which gets none of its arguments."""
        return Scope(self.path + step, {}, self.configurable)


Lower = Callable[["Lowering", Any, Any, Scope], Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """How Runnables of a kind are lowered.

    A rule computes what `invoke` would return, with `Variable`, `Answer` and the like in place of what is not known
    yet, and raises whatever it likes where it cannot; it does so before it plans calls.

    Attributes:
        lower: The rule.
        parts: Fields that hold the Runnables which the Runnable runs; it is copied with client steps in them.
        applies: Whether the rule holds for this one; others are client steps.
        whole: It makes calls itself: a leaf, whose own output is reported where its calls are not planned.
        transparent: While a plan is there, it does nothing but run its only part.
    """

    lower: Lower
    parts: tuple[str, ...] = ()
    applies: Callable[[Any], bool] | None = None
    whole: bool = False
    transparent: bool = False


_RULES: dict[type[Any], Rule] = {}


def rule(
    *kinds: type[Any],
    parts: tuple[str, ...] = (),
    applies: Callable[[Any], bool] | None = None,
    whole: bool = False,
    transparent: bool = False,
) -> Callable[[Lower], Lower]:
    """Register how Runnables of these kinds, and of subclasses that leave `invoke` as it is, are lowered."""

    def register(function: Lower) -> Lower:
        _RULES.update(dict.fromkeys(kinds, Rule(function, parts, applies, whole, transparent)))
        _of_kind.cache_clear()
        return function

    return register


def rule_for(runnable: Runnable[Any, Any]) -> Rule | None:
    """The rule for a Runnable; None if it is a client step."""
    rule = _of_kind(type(runnable))
    return rule if rule is None or rule.applies is None or rule.applies(runnable) else None


def parts(runnable: Runnable[Any, Any]) -> Iterator[Runnable[Any, Any]]:
    """The Runnables that it runs."""
    rule = rule_for(runnable)
    for name in rule.parts if rule else ():
        yield from _runnables(getattr(runnable, name))


def contains_model(runnable: Runnable[Any, Any]) -> bool:
    """Whether it may make calls that can be planned."""
    rule = rule_for(runnable)
    if rule is None:
        return False
    return rule.whole or getattr(runnable, "routes", False) or any(map(contains_model, parts(runnable)))


@functools.cache
def _of_kind(kind: type[Runnable[Any, Any]]) -> Rule | None:
    if any(base.__module__.startswith("langchain_classic.") for base in kind.__mro__):
        import langchain_macaw.legacy  # noqa: F401  (registers its rules; whoever has such a chain has the package)
    base = next((base for base in kind.__mro__ if base in _RULES), None)
    return _RULES[base] if base is not None and kind.invoke is base.invoke else None


def _runnables(value: Any) -> Iterator[Runnable[Any, Any]]:
    if isinstance(value, Runnable):
        yield value
    elif isinstance(value, dict):
        yield from _runnables([*value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _runnables(item)
