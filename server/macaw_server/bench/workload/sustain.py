"""The highest rate that each side sustains: all of them search at the same time, in turn, one probe each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from macaw_server.bench.workload.probe import Probe, Slo, fresh
from macaw_server.bench.workload.search import LADDER, NEAR, RateSearch
from macaw_server.workloads import WORKLOADS, ProgramSpec, WorkloadOptions, make_workload

MAX_STRETCH = 4.0
"""A probe's programs arrive over so many times the wanted time at most, where the rate is so low that they are few."""
FIRST_BUDGET, NEXT_BUDGET = 16.0, 8.0
"""Time of all probes of a side in the first round and in each further one, in wanted times of a probe."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How rates are tried.

    Attributes:
        slo: What is to be kept.
        probe_s: Programs arrive for so long at each rate, longer where they would be too few.
        min_programs: At each rate.
        speed: The client's gaps will be so many times shorter, and arrivals with them; rates are what comes of it.
    """

    slo: Slo
    probe_s: float = 20.0
    min_programs: int = 20
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.slo.share <= 1:
            raise ValueError(f"--slo-share {self.slo.share:g} was given; a share above 0 up to 1 is accepted.")
        if self.probe_s <= 0:
            raise ValueError(f"--probe-s {self.probe_s:g} was given; it must be above 0.")

    @property
    def floor(self) -> float:
        """The lowest rate, per second, that is tried."""
        return self.min_programs / (MAX_STRETCH * self.probe_s)

    def budget_s(self, i: int) -> float:
        """Of a side in round `i`: when it is used up no other probe begins."""
        return self.probe_s * (NEXT_BUDGET if i else FIRST_BUDGET)

    def limit_s(self, num_rounds: int, allowed_s: float) -> float:
        """Of one side's probes in all rounds; the last of each may begin when the budget is all but used up.

        Args:
            num_rounds: How many.
            allowed_s: A program of the workload has so long before it is late, at most.
        """
        return sum(self.budget_s(i) + MAX_STRETCH * self.probe_s + 2 * allowed_s for i in range(num_rounds))


@dataclass(frozen=True, slots=True)
class Found:
    """One side's search in one round.

    Attributes:
        rate: The highest that was sustained; 0: none.
        failed_rate: The lowest that was not; None: all that were tried are sustained.
        probes: All, in order.
    """

    rate: float
    failed_rate: float | None
    probes: list[Probe]

    @property
    def best(self) -> Probe | None:
        """At the highest rate that was sustained."""
        return next((probe for probe in self.probes if probe.sustained and probe.rate == self.rate), None)


TryRate = Callable[[str, float, int, int], Probe]
"""Runs a probe: of the side with this name, at this rate, in this round; the last number counts the side's probes."""


def search_rates(
    starts: dict[str, float],
    options: SearchOptions,
    num_rounds: int,
    try_rate: TryRate,
    on_time: Callable[[float], None] = lambda seconds: None,
) -> dict[str, list[Found]]:
    """What each side sustains, round by round.

    Args:
        starts: By side, a guess, as programs per second.
        options: How rates are tried.
        num_rounds: Each side begins the second at the rate of the first, and so on.
        try_rate: Runs one probe.
        on_time: Told how much of the sides' budgets is gone, after each probe.
    """
    found: dict[str, list[Found]] = {side: [] for side in starts}
    numbers = {side: count() for side in starts}
    sides = list(starts)
    for i in range(num_rounds):
        # Who goes first changes from round to round.
        turn = [*sides[i % len(sides) :], *sides[: i % len(sides)]]
        searches = {
            side: _Search(
                RateSearch(found[side][-1].rate or options.floor, options.floor, NEAR)
                if i
                else RateSearch(starts[side], options.floor, LADDER),
                options.budget_s(i),
            )
            for side in turn
        }
        while any(search.next_rate is not None for search in searches.values()):
            for side, search in searches.items():
                if (rate := search.next_rate) is not None:
                    on_time(search.take(try_rate(side, rate, i, next(numbers[side]))))
        for side, search in searches.items():
            on_time(search.left_s)
            found[side].append(search.found)
    return found


class _Search:
    """A search with a budget of time."""

    def __init__(self, search: RateSearch, budget_s: float) -> None:
        self._search, self.left_s = search, budget_s
        self._probes: list[Probe] = []

    @property
    def next_rate(self) -> float | None:
        return self._search.next_rate if self.left_s > 0 else None

    def take(self, probe: Probe) -> float:
        """Gives the seconds of the budget that it used."""
        self._search.tell(probe.rate, probe.sustained)
        self._probes.append(probe)
        used_s = min(probe.duration_s, self.left_s)
        self.left_s -= used_s
        return used_s

    @property
    def found(self) -> Found:
        high = self._search.high
        return Found(self._search.low, None if high == math.inf else high, self._probes)


def sample(workload: str, options: WorkloadOptions, num_programs: int) -> list[ProgramSpec]:
    """The first programs, and the first of each app that has a prefix of its own; all of them arrive at once."""
    programs = list(make_workload(workload, options))
    firsts = {spec.app: spec for spec in reversed(programs)}
    chosen = {spec.id: spec for spec in (*programs[:num_programs], *firsts.values())}
    return [replace(spec, arrival_s=0.0) for spec in chosen.values()]


def programs_at(
    workload: str, options: WorkloadOptions, search: SearchOptions, rate: float, i: int, tag: str
) -> list[ProgramSpec]:
    """The programs of a probe: with the same round `i` always the same ones, closer together or farther apart.

    Their own texts are new with each `tag`, so that a cache knows of earlier probes only what programs share. Other
    streams than the first have their own rates, and end with the first.
    """
    num = max(search.min_programs, math.ceil(rate * search.probe_s))
    own_rate = rate / search.speed
    made = make_workload(workload, replace(options, seed=options.seed + i, num_programs=num, rate=own_rate))
    return [fresh(spec, tag) for spec in _until_last(made, f"{WORKLOADS[workload][0].name}-", num)]


def _until_last(programs: Iterator[ProgramSpec], prefix: str, num: int) -> Iterator[ProgramSpec]:
    """Up to the `num`-th program whose id begins with `prefix`."""
    for spec in programs:
        yield spec
        num -= spec.id.startswith(prefix)
        if not num:
            return
