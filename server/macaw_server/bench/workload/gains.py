"""What each switch brings by itself, and all of them together; ratios are taken within a round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from macaw_server.bench.report import Spread
from macaw_server.bench.workload.records import Outcome, Run
from macaw_server.bench.workload.sides import BASELINES, MACAW, SWITCHES


@dataclass(frozen=True, slots=True)
class Gain:
    """Mean latency of a side over that of Macaw with everything on.

    Attributes:
        name: Of the switch that is off, or ``all (requests)``, where all of them are.
        by_app: Median, least and most over the rounds.
    """

    name: str
    by_app: dict[str, Spread]


def switch_gains(rounds: dict[str, list[Run]]) -> list[Gain]:
    """Of each switch that was measured, then of all together over each baseline; nothing where no switch was.

    Args:
        rounds: Runs by side.
    """
    alone = {side.name: str(side.switch) for side in SWITCHES.values()}
    together = {side.name: f"all ({side.name})" for side in BASELINES.values()}
    if not alone.keys() & rounds.keys():
        return []
    return [
        Gain(name, {app: _gain(app, rounds[side], rounds[MACAW.name]) for app in rounds[side][0].apps})
        for side, name in {**alone, **together}.items()
        if side in rounds
    ]


def _gain(app: str, without: Sequence[Run], whole: Sequence[Run]) -> Spread:
    return Spread.of([_mean_s(a.of(app)) / _mean_s(b.of(app)) for a, b in zip(without, whole, strict=True)])


def _mean_s(outcomes: Sequence[Outcome]) -> float:
    return statistics.fmean(outcome.latency_s for outcome in outcomes)
