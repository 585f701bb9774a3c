"""`macaw bench engine`: the same bursts on Macaw and on a peer, in alternation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from macaw_server.bench.cases import Case
from macaw_server.bench.client import Burst, Side

WARM_UP_LEN = 2
"""Tokens of answer in a warm-up: enough for a prefill and a decode step."""


@dataclass(frozen=True, slots=True)
class Result:
    """All rounds of one case: the bursts of each side, by its name; round `i` of all sides had the same prompts."""

    case: Case
    bursts: dict[str, list[Burst]]


async def run_cases(
    cases: Sequence[Case],
    sides: Sequence[Side],
    *,
    num_rounds: int,
    ids: range,
    seed: int,
    on_progress: Callable[[str], object],
) -> list[Result]:
    """Measure every case on every side; who goes first changes from round to round.

    Args:
        cases: In this order.
        sides: Connected.
        num_rounds: Bursts per case and side.
        ids: Token ids to make prompts of.
        seed: Of the prompts. A server that has seen this seed before is not cold.
        on_progress: Told what comes next.

    Raises:
        BenchError: A request failed or did other work than was asked for.
    """
    for side in sides:
        on_progress(f"warming up {side.name}")
        await side.burst([list(ids[:16])] * 2, WARM_UP_LEN)
    results = []
    for case in cases:
        bursts: dict[str, list[Burst]] = {side.name: [] for side in sides}
        for i in range(num_rounds):
            prompts = case.prompts(ids, seed, i)
            for side in sides if i % 2 == 0 else reversed(sides):
                on_progress(f"{case.name}, round {i + 1} of {num_rounds}: {side.name}")
                if case.warm:
                    await side.burst(case.prompts(ids, seed, i, warm_up=True), WARM_UP_LEN)
                bursts[side.name].append(await side.burst(prompts, case.output_len))
        results.append(Result(case, bursts))
    return results
