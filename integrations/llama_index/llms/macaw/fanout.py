"""Calls that do not depend on each other, such as those of an extractor over many nodes: sent together, replayed.

What makes them decides nothing by their answers, so all of them are known when it starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from llama_index.llms.macaw.lowering import Lowering, NotStatic
from llama_index.llms.macaw.running import CURRENT_RUN, Lowered, Run

T = TypeVar("T")

MAX_CALLS = 512
"""Of one program. The next one starts when its first call is asked for, so that a large ingestion floods nobody."""

logger = logging.getLogger(__name__)

Unit = Callable[[Lowering], object]
"""Plans calls that belong into one program."""


def lower_units(name: str, units: Iterable[Unit]) -> list[Lowered]:
    """Programs of as many units as fit; what is not static is left out.

    Args:
        name: What is run; a label of the programs.
        units: In the order in which native code comes to them.
    """
    lowered: list[Lowered] = []
    lowering = Lowering(name)
    for unit in units:
        if lowering.num_calls >= MAX_CALLS:
            lowered += _planned(lowering)
            lowering = Lowering(name)
        try:
            unit(lowering)
        except NotStatic as reason:
            logger.info("What %s asks for is planned in part: %s", name, reason)
    return lowered + _planned(lowering)


def _planned(lowering: Lowering) -> list[Lowered]:
    plan = lowering.plan()
    return [Lowered(plan, lowering.llm)] if plan and lowering.llm else []


async def answered(owner: object, plans: list[Lowered], native: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """``await native()``, with its requests answered from `plans`, or from the run around if that has them all."""
    around = CURRENT_RUN.get()
    if not plans or (around is not None and all(around.holds(lowered.plan.ready_keys()) for lowered in plans)):
        return await native()
    run = Run(owner, asynchronous=True)
    run.add(plans[0])
    run.add_later(plans[1:])
    try:
        result: T = await run.acall(native())
    finally:
        await run.aclose()
    return result
