"""Who goes first: ordering strategies, by name.

This is the thin version. It knows what a call says of itself (`CallHints`); attained service, remaining
critical path, fairness between tenants and the cost of recomputing come as further strategies or deeper keys
behind the same interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from macaw_server.scheduler.types import Sequence

AGEING_S = 30.0
"""Whoever has waited longer goes before everybody younger, whatever their class. So a call waits at most this
long plus the time to serve what came before it."""

Key = tuple[float, ...]
Order = tuple[bool, Key, int]


class Policy(ABC):
    """An order over sequences.

    Attributes:
        name: What `--policy` calls it.
        ageing_s: Wait in seconds after which arrival alone counts.
    """

    name: ClassVar[str]
    ageing_s: float = AGEING_S

    @abstractmethod
    def key(self, sequence: Sequence) -> Key:
        """Its place among those that have not aged; smaller goes first. Does not change while it waits."""

    def order(self, sequence: Sequence, now_s: float) -> Order:
        """Its place among all at this moment; smaller goes first."""
        aged = now_s - sequence.arrival_s > self.ageing_s
        return not aged, (sequence.arrival_s,) if aged else self.key(sequence), sequence.number

    def preemption_order(self, sequence: Sequence, now_s: float) -> Order:
        """Whoever is largest loses its pages first.

        The default preempts in reverse of the admission order: the first in order is never preempted while
        another one runs, and therefore ends; so everybody does.
        """
        return self.order(sequence, now_s)


class FcfsPolicy(Policy):
    """First come, first served."""

    name = "fcfs"

    def key(self, sequence: Sequence) -> Key:
        """By arrival."""
        return (sequence.arrival_s,)


class AppPolicy(Policy):
    """What applications wait for: by class, then the deepest call (it ends a program), then arrival."""

    name = "app"

    def key(self, sequence: Sequence) -> Key:
        """By class, depth and arrival."""
        hints = sequence.request.hints
        return (hints.call_class, -hints.depth, sequence.arrival_s)


_POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (FcfsPolicy, AppPolicy)}


def make_policy(name: str = AppPolicy.name) -> Policy:
    """The strategy of that name.

    Raises:
        ValueError: There is none; the message has those there are.
    """
    if name not in _POLICIES:
        raise ValueError(f"No scheduling policy {name!r}; choose one of {', '.join(sorted(_POLICIES))}.")
    return _POLICIES[name]()
