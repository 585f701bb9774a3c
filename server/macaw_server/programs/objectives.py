"""Objectives: from what the application waits for to a class for every call (Parrot, OSDI 2024, section 5.2).

The graph is walked backwards from its targets. A call hands its own class on to what feeds it, and where
several independent calls feed one consumer they become a *task group*: only the end of the last one matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from macaw.protocol import Call, ChatCompletionRequest
from macaw_server.engine.types import CallClass

from .graph import Graph

USUAL_OUTPUT_TOKENS = 256
"""What a call's answer is taken to need at most where nobody says less."""


class Objective(NamedTuple):
    """What the scheduler needs to know of a call.

    Attributes:
        call_class: The strictest that any consumer or target asks for; BACKGROUND while nothing asks.
        depth: Calls before this one on its longest path.
        group: Id of the consumer that its task group feeds. A chain that ends in a member belongs to it too.
        remaining_tokens: Estimate of the output tokens on the longest path from here to the end, its own included.
        deadline_ms: The earliest of the targets behind it, from the program's start.
    """

    call_class: CallClass = CallClass.BACKGROUND
    depth: int = 0
    group: str | None = None
    remaining_tokens: float = 0.0
    deadline_ms: float = math.inf


def deduce(graph: Graph, calls: Iterable[str]) -> dict[str, Objective]:
    """The objectives of `calls`: those that are not finished, producers before consumers.

    - A latency target's calls inherit LATENCY, a throughput target's BACKGROUND.
    - Two or more independent calls that feed the same consumer, directly or through transforms, are a task
      group: GROUP instead of LATENCY. The consumer is a call, or the transform that makes a target.
    - The only feeder of a group's member is part of that member's branch and inherits its class and group;
      but one that several members wait for comes before the group as a whole, and inherits LATENCY.
    - The strictest wins; among equals the one deduced first, which is the one nearest to the targets.
    """
    best = {call_id: Objective(depth=graph.depth[call_id]) for call_id in calls}
    _look_ahead(graph, best)
    heads: set[str] = set()  # calls that are the only feeder of some member of a group

    def offer(call_id: str, call_class: CallClass, group: str | None) -> None:
        old = best.get(call_id)
        if old is None:
            return
        if call_class < old.call_class or (call_class == old.call_class and old.group is None):
            best[call_id] = old._replace(call_class=call_class, group=group)

    def feed(consumer: str, feeders: list[str], call_class: CallClass, group: str | None) -> None:
        """Offer a consumer's class to the calls that feed it and that no other feeder waits for."""
        earlier = graph.ancestors_of(feeders)
        members = [call_id for call_id in feeders if not graph.bit[call_id] & earlier]
        if len(members) > 1:
            for call_id in members:
                offer(call_id, max(call_class, CallClass.GROUP), consumer)
        elif members and call_class is CallClass.GROUP and members[0] in heads:
            offer(members[0], CallClass.LATENCY, None)
        elif members:
            if call_class is CallClass.GROUP:
                heads.add(members[0])
            offer(members[0], call_class, group)

    for target in graph.targets:
        asked = CallClass.LATENCY if target.objective == "latency" else CallClass.BACKGROUND
        feed(graph.producers[target.variable] or "", graph.feeders[target.variable], asked, None)
    for call_id in reversed(list(best)):
        feed(call_id, graph.feeders_of(call_id), best[call_id].call_class, best[call_id].group)
    return best


def _look_ahead(graph: Graph, objectives: dict[str, Objective]) -> None:
    """Fill in what lies between each call and the end of the program."""
    after = dict.fromkeys(objectives, 0.0)
    deadlines = dict.fromkeys(objectives, math.inf)
    for target in graph.targets:
        for call_id in graph.feeders[target.variable]:
            if call_id in deadlines and target.deadline_ms is not None:
                deadlines[call_id] = min(deadlines[call_id], target.deadline_ms)
    for call_id in reversed(list(objectives)):
        remaining, deadline_ms = after[call_id] + _output_tokens(graph, call_id), deadlines[call_id]
        objectives[call_id] = objectives[call_id]._replace(remaining_tokens=remaining, deadline_ms=deadline_ms)
        for feeder in graph.feeders_of(call_id):
            if feeder in after:
                after[feeder] = max(after[feeder], remaining)
                deadlines[feeder] = min(deadlines[feeder], deadline_ms)


def _output_tokens(graph: Graph, call_id: str) -> int:
    """How many tokens a call's answer may need: limits are often far above what comes."""
    step = graph.steps[call_id]
    assert isinstance(step, Call), f"{call_id!r} is a {type(step).__name__}"
    request = step.request
    limit = request.max_completion_tokens if isinstance(request, ChatCompletionRequest) else None
    return min(limit or request.max_tokens or USUAL_OUTPUT_TOKENS, USUAL_OUTPUT_TOKENS)
