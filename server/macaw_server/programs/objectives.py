"""Objectives: from what the application waits for to a class for every call (Parrot, OSDI 2024, section 5.2).

The graph is walked backwards from its targets. A call hands its own class on to what feeds it, and where
several independent calls feed one consumer they become a *task group*: only the end of the last one matters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from macaw.protocol import Call
from macaw_server.engine.types import CallClass

from .graph import Graph, inputs_of


class Objective(NamedTuple):
    """What the scheduler needs to know of a call.

    Attributes:
        call_class: The strictest that any consumer or target asks for; BACKGROUND while nothing asks.
        depth: Calls before this one on its longest path.
        group: Id of the consumer that its task group feeds. A chain that ends in a member belongs to it too.
    """

    call_class: CallClass = CallClass.BACKGROUND
    depth: int = 0
    group: str | None = None


def deduce(graph: Graph) -> dict[str, Objective]:
    """The objective of every call.

    - A latency target's calls inherit LATENCY, a throughput target's BACKGROUND.
    - Two or more independent calls that feed the same consumer, directly or through transforms, are a task
      group: GROUP instead of LATENCY. The consumer is a call, or the transform that makes a target.
    - The only feeder of a group's member is part of that member's branch and inherits its class and group;
      but one that several members wait for comes before the group as a whole, and inherits LATENCY.
    - The strictest wins; among equals the one deduced first, which is the one nearest to the targets.
    """
    feeders = _feeders(graph)
    calls = [step for step_id in graph.order if isinstance(step := graph.steps[step_id], Call)]
    depth: dict[str, int] = {}
    ancestors: dict[str, int] = {}
    bit = {call.id: 1 << i for i, call in enumerate(calls)}
    for call in calls:
        sources = _sources(inputs_of(call), feeders)
        depth[call.id] = 1 + max((depth[s] for s in sources), default=-1)
        ancestors[call.id] = _union(bit[s] | ancestors[s] for s in sources)

    best = {call.id: Objective(depth=depth[call.id]) for call in calls}
    heads: set[str] = set()  # calls that are the only feeder of some member of a group

    def offer(call_id: str, call_class: CallClass, group: str | None) -> None:
        old = best[call_id]
        if call_class < old.call_class or (call_class == old.call_class and old.group is None):
            best[call_id] = Objective(call_class, old.depth, group)

    def feed(consumer: str, sources: list[str], call_class: CallClass, group: str | None) -> None:
        """Offer a consumer's class to the calls that feed it and that no other feeder waits for."""
        earlier = _union(ancestors[s] for s in sources)
        members = [s for s in sources if not bit[s] & earlier]
        if len(members) > 1:
            for s in members:
                offer(s, max(call_class, CallClass.GROUP), consumer)
        elif members and call_class is CallClass.GROUP and members[0] in heads:
            offer(members[0], CallClass.LATENCY, None)
        elif members:
            if call_class is CallClass.GROUP:
                heads.add(members[0])
            offer(members[0], call_class, group)

    for target in graph.targets:
        asked = CallClass.LATENCY if target.objective == "latency" else CallClass.BACKGROUND
        feed(graph.producers[target.variable] or "", list(feeders[target.variable]), asked, None)
    for call in reversed(calls):
        feed(call.id, _sources(inputs_of(call), feeders), best[call.id].call_class, best[call.id].group)
    return best


def _feeders(graph: Graph) -> dict[str, tuple[str, ...]]:
    """For every variable the calls whose answers reach it through transforms only."""
    feeders: dict[str, tuple[str, ...]] = {
        name: () for name, producer in graph.producers.items() if not producer
    }
    for step_id in graph.order:
        step = graph.steps[step_id]
        feeders[step.output] = (step.id,) if isinstance(step, Call) else tuple(_sources(step.inputs, feeders))
    return feeders


def _sources(names: Iterable[str], feeders: dict[str, tuple[str, ...]]) -> list[str]:
    return list(dict.fromkeys(call_id for name in names for call_id in feeders[name]))


def _union(masks: Iterable[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union
