"""The search for the sustained rate, on sides whose capacity is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from macaw_server.bench.workload.probe import Probe, Slo
from macaw_server.bench.workload.search import TOLERANCE, RateSearch
from macaw_server.bench.workload.sustain import Found, SearchOptions, search_rates

OPTIONS = SearchOptions(Slo(100.0, 0.9), probe_s=10.0, min_programs=20)
FLOOR = 0.5
RATES = st.floats(0.01, 1000.0)


def probe(rate: float, sustained: bool, duration_s: float = 0.0) -> Probe:
    return Probe(rate, sustained, 20, 20 if sustained else 10, 0, 0, not sustained, 50.0, 90.0, 0.1, 0.5, duration_s)


def search(
    start: float, capacity: float, hiccups: Callable[[int], bool] = lambda i: False
) -> tuple[float, list[float]]:
    """The rate that is found, and the rates that were tried; `hiccups` tells of each probe if something else ran."""
    searching, tried = RateSearch(start, FLOOR), list[float]()
    while (rate := searching.next_rate) is not None:
        searching.tell(rate, rate <= capacity and not hiccups(len(tried)))
        tried.append(rate)
    return searching.low, tried


@given(start=RATES, capacity=RATES)
def test_the_highest_sustained_rate_is_found(start: float, capacity: float) -> None:
    found, tried = search(start, capacity)
    if capacity < FLOOR:
        assert found == 0
        assert min(tried) == FLOOR
    else:
        assert found <= capacity < found * TOLERANCE * (1 + 1e-9)
    assert all(rate >= FLOOR for rate in tried)


@given(start=RATES, capacities=st.tuples(RATES, RATES))
def test_who_can_do_more_is_found_to_do_no_less(start: float, capacities: tuple[float, float]) -> None:
    less, more = sorted(capacities)
    assert search(start, less)[0] <= search(start, more)[0]


@given(start=RATES, capacity=RATES, hiccup=st.integers(0, 12))
def test_one_hiccup_changes_nothing(start: float, capacity: float, hiccup: int) -> None:
    assert search(start, capacity, lambda i: i == hiccup)[0] == search(start, capacity)[0]


@given(capacities=st.lists(st.floats(1.0, 50.0), min_size=2, max_size=4))
def test_sides_search_in_turn_and_each_for_itself(capacities: list[float]) -> None:
    sides = {f"side{i}": capacity for i, capacity in enumerate(capacities)}
    order: list[tuple[int, str]] = []

    def try_rate(side: str, rate: float, i: int, number: int) -> Probe:
        assert number == sum(s == side for _, s in order)
        order.append((i, side))
        return probe(rate, rate <= sides[side])

    found = search_rates(dict.fromkeys(sides, 4.0), OPTIONS, 3, try_rate)
    for side, capacity in sides.items():
        assert len(found[side]) == 3
        for one in found[side]:
            assert one.rate <= capacity < one.rate * TOLERANCE * (1 + 1e-9)
            assert one.failed_rate is not None
            assert one.rate < one.failed_rate <= one.rate * TOLERANCE * (1 + 1e-9)
            assert one.best is not None
            assert one.best.rate == one.rate
        # Later rounds begin where the first has ended.
        assert all(len(one.probes) <= 6 for one in found[side][1:])
    for i in range(3):
        turns = [side for number, side in order if number == i]
        assert turns[: len(sides)] == [f"side{(i + j) % len(sides)}" for j in range(len(sides))]


@given(
    capacity=st.floats(0.01, 100.0),
    duration_s=st.floats(1.0, 40.0),
    start=st.floats(0.1, 20.0),
    rounds=st.integers(1, 3),
)
def test_it_takes_no_longer_than_was_said(capacity: float, duration_s: float, start: float, rounds: int) -> None:
    spent: list[float] = []
    told: list[float] = []

    def try_rate(side: str, rate: float, i: int, number: int) -> Probe:
        spent.append(duration_s)
        return probe(rate, rate <= capacity, duration_s)

    (found,) = search_rates({"side": start}, OPTIONS, rounds, try_rate, told.append).values()
    assert len(found) == rounds
    assert sum(spent) <= OPTIONS.limit_s(rounds, allowed_s=0.0)
    assert sum(told) == pytest.approx(sum(map(OPTIONS.budget_s, range(rounds))))


def test_out_of_time_is_what_is_known_by_then() -> None:
    (found,) = search_rates({"side": 1.0}, OPTIONS, 1, lambda side, rate, i, n: probe(rate, True, 40.0))["side"]
    assert found == Found(8.0, None, [probe(rate, True, 40.0) for rate in (1.0, 2.0, 4.0, 8.0)])


@pytest.mark.parametrize(("slo_share", "probe_s"), [(0.0, 1.0), (1.1, 1.0), (0.9, 0.0)])
def test_options_that_make_no_sense(slo_share: float, probe_s: float) -> None:
    with pytest.raises(ValueError, match="was given; "):
        SearchOptions(Slo(100.0, slo_share), probe_s)
