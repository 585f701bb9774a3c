"""Who goes first: ordering strategies, by name. Pure: the clock is an argument."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from macaw_server.engine.types import CallClass
from macaw_server.scheduler.fairness import AttainedService, FairShares
from macaw_server.scheduler.types import Sequence

AGEING_S = 60.0
"""Whoever has waited longer goes before everybody younger of its tenant, whatever their class. So a call waits at most
this long, plus the time that its tenant's share of the engine takes for the tenant's calls that came before it."""
TENANT_LEAD = 8192.0
"""Service by which a tenant may be ahead of another one that waits, before it gives up a place in the batch."""

Key = tuple[float, ...]
Order = tuple[float, bool, Key, int]
PreemptionOrder = tuple[bool, Key, int]


class Policy(ABC):
    """An order over sequences: by lane, then those that are due, then by key.

    Attributes:
        name: What `--policy` calls it.
        protects_latency: Whether other calls ride along only as far as they do not slow latency-critical ones.
        ageing_s: Wait in seconds after which a sequence is due.
    """

    name: ClassVar[str]
    protects_latency: ClassVar[bool] = False
    ageing_s: float = AGEING_S

    @abstractmethod
    def key(self, sequence: Sequence) -> Key:
        """Its place among those of its lane that are not due; smaller goes first. Never falls while it waits."""

    def lane(self, sequence: Sequence) -> str:
        """What it queues in; lanes take turns by `lane_rank`."""
        return ""

    def lane_rank(self, lane: str) -> float:
        """The lane of the smallest rank goes first. Never falls while somebody waits in it."""
        return 0.0

    def due_s(self, sequence: Sequence) -> float:
        """When it stops giving way."""
        return sequence.arrival_s + self.ageing_s

    def call_class(self, sequence: Sequence) -> CallClass:
        """What it counts as."""
        return sequence.request.hints.call_class

    def is_critical(self, sequence: Sequence) -> bool:
        """Whether its time per token is what an application waits for."""
        return self.call_class(sequence) is CallClass.LATENCY

    def order(self, sequence: Sequence, now_s: float) -> Order:
        """Its place among all at this moment; smaller goes first."""
        due_s = self.due_s(sequence)
        due = now_s > due_s
        return (
            self.lane_rank(self.lane(sequence)),
            not due,
            (due_s,) if due else self.key(sequence),
            sequence.number,
        )

    def preemption_order(self, sequence: Sequence, now_s: float) -> PreemptionOrder:
        """Whoever is largest loses its pages first; does not depend on what has been served meanwhile.

        So the first in this order is never preempted while another one runs, and therefore ends; so everybody does.
        """
        due_s = self.due_s(sequence)
        due = now_s > due_s
        return not due, (due_s,) if due else (sequence.arrival_s,), sequence.number

    def preempts(self, waiting: Sequence, running: Sequence, now_s: float) -> bool:
        """Whether a sequence that finds no place or no pages takes those of a running one."""
        return False

    def claim_steps(self, sequence: Sequence, *, in_program: bool) -> float:
        """By how many calls more a claim on cached pages is discounted (`Retainer`).

        Args:
            sequence: Which waits, or has ended.
            in_program: The claim is for a call to come of its program, and not for itself.
        """
        return 0.0

    def enter(self, sequence: Sequence) -> None:  # noqa: B027
        """It waits from now on."""

    def leave(self, sequence: Sequence) -> None:  # noqa: B027
        """It waits no more."""

    def charge(self, sequence: Sequence, service: float) -> None:  # noqa: B027
        """It was served: prompt tokens computed, output tokens at `fairness.OUTPUT_SERVICE`."""


class FcfsPolicy(Policy):
    """First come, first served."""

    name = "fcfs"

    def key(self, sequence: Sequence) -> Key:
        """By arrival."""
        return (sequence.arrival_s,)


class AppPolicy(Policy):
    """What applications wait for.

    1. Tenants, by weighted service received.
    2. Calls that are due: by when they became so. A deadline makes a call due when it has to start.
    3. Class: latency-critical, then task groups, then background.
    4. Programs: the least work left where that is known, else the least service so far (Autellix, Luo et al.,
       2025), in powers of two, so that programs of about the same size do not overtake each other in turns.
    5. The deepest call: it ends a program. Then arrival, by which the calls of a group stay together.

    Args:
        task_groups: Whether the calls of a group count as such, or each like a call by itself.
    """

    name = "app"
    protects_latency = True

    def __init__(self, *, task_groups: bool = True) -> None:
        self._task_groups = task_groups
        self.shares = FairShares()
        self.attained = AttainedService()

    def call_class(self, sequence: Sequence) -> CallClass:
        """As deduced; a group's is that of the latency-critical call which it feeds, where groups do not count."""
        found = super().call_class(sequence)
        return CallClass.LATENCY if found is CallClass.GROUP and not self._task_groups else found

    def key(self, sequence: Sequence) -> Key:
        """By class, size of the program, depth and arrival."""
        hints = sequence.request.hints
        size = self.attained[hints.program_id] if hints.work_tokens is None else hints.work_tokens
        return (self.call_class(sequence), _magnitude(size), -hints.depth, sequence.arrival_s)

    def lane(self, sequence: Sequence) -> str:
        """By tenant."""
        return sequence.request.hints.tenant

    def lane_rank(self, lane: str) -> float:
        """By service."""
        return self.shares.service(lane)

    def due_s(self, sequence: Sequence) -> float:
        """By age, or when its deadline wants it to start."""
        return min(sequence.arrival_s + self.ageing_s, sequence.latest_start_s)

    def preemption_order(self, sequence: Sequence, now_s: float) -> PreemptionOrder:
        """The lowest class first, in it the latest: it has the least to compute again."""
        due, key, number = super().preemption_order(sequence, now_s)
        return due, (self.call_class(sequence), *key) if due else key, number

    def preempts(self, waiting: Sequence, running: Sequence, now_s: float) -> bool:
        """A critical call goes before others, and a tenant that was served far less before one served more."""
        if self.order(running, now_s) < self.order(waiting, now_s):
            return False  # it would be taken in again at once
        a, b = waiting.request.hints.tenant, running.request.hints.tenant
        if self.shares.service(b) - self.shares.service(a) > TENANT_LEAD:
            return True
        return self.is_critical(waiting) and not self.is_critical(running) and now_s <= self.due_s(running)

    def claim_steps(self, sequence: Sequence, *, in_program: bool) -> float:
        """Half a call for each class, and of programs that may grow a quarter for each power of two of service."""
        hints = sequence.request.hints
        steps = 0.5 * self.call_class(sequence)
        if in_program and hints.work_tokens is None:
            steps += 0.25 * (_magnitude(self.attained[hints.program_id]) - _magnitude(0))
        return steps

    def enter(self, sequence: Sequence) -> None:
        """One call more of its tenant waits."""
        self.shares.enter(sequence.request.hints.tenant)

    def leave(self, sequence: Sequence) -> None:
        """One call less of its tenant waits."""
        self.shares.leave(sequence.request.hints.tenant)

    def charge(self, sequence: Sequence, service: float) -> None:
        """To its tenant, and to its program; work ahead of time has no part in shares."""
        if sequence.is_ahead:
            return
        hints = sequence.request.hints
        self.shares.charge(hints.tenant, service, hints.tenant_weight)
        self.attained.charge(hints.program_id, service)


def _magnitude(size: float) -> float:
    """The power of two at or below, of sizes from 64 tokens on."""
    return math.floor(math.log2(max(size, 64.0)))


_POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (FcfsPolicy, AppPolicy)}


def make_policy(name: str = AppPolicy.name, *, task_groups: bool = True) -> Policy:
    """The strategy of that name; `task_groups` is for ``app``, as others know none.

    Raises:
        ValueError: There is none; the message has those there are.
    """
    if name not in _POLICIES:
        raise ValueError(f"No scheduling policy {name!r}; choose one of {', '.join(sorted(_POLICIES))}.")
    return AppPolicy(task_groups=task_groups) if name == AppPolicy.name else _POLICIES[name]()
