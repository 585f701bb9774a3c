from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macaw_server.engine.types import EngineRequest
from macaw_server.scheduler import Coefficients, StepTimeModel
from macaw_server.scheduler.placement import Placement, PrefixIndex, make_placer
from macaw_server.scheduler.placer import LeastLoaded
from server.scheduler.engine_model import request

COSTS = StepTimeModel(Coefficients(fixed=5.0, token=0.5, sample=0.5, kv_token=1e-3, score=0.0))


def placement(num_engines: int, capacity: int = 100_000) -> Placement:
    return Placement(num_engines, capacity, COSTS, block_size=16)


def text(key: int, length: int) -> list[int]:
    return list(range(key << 20, (key << 20) + length))


def group(name: str, size: int, prefix: int, own: int, key: int = 1) -> list[EngineRequest]:
    return [request(f"{name}{i}", text(key, prefix) + text(1000 * key + i, own), 8) for i in range(size)]


class TestPlacement:
    def test_a_group_with_a_long_prefix_stays_together(self) -> None:
        place = placement(4)
        assert len({place.place(r) for r in group("a", 8, prefix=4000, own=32)}) == 1

    def test_a_group_with_a_short_prefix_spreads(self) -> None:
        place = placement(4)
        assert Counter(place.place(r) for r in group("a", 8, prefix=16, own=1000)) == {0: 2, 1: 2, 2: 2, 3: 2}

    def test_a_long_prefix_does_not_hold_a_group_that_would_wait_longer(self) -> None:
        place = placement(4)
        engines = Counter(place.place(r) for r in group("a", 64, prefix=4000, own=500))
        assert len(engines) == 4
        assert min(engines.values()) >= 12  # the first members stay with the prefix

    def test_a_consumer_follows_its_producers_answer(self) -> None:
        place = placement(4)
        for r in group("load", 3, prefix=0, own=64, key=5):  # engines 0, 1 and 2 work
            place.place(r)
        producer = request("p", text(7, 500), 400)
        assert place.place(producer) == 3
        answer = text(8, 400)
        place.ended(producer, answer)
        for i in range(3):
            place.ended(request(f"load{i}", [1]), [])
        assert place.place(request("c", [*text(7, 500), *answer, *text(9, 10)], 8)) == 3

    def test_tenants_do_not_find_each_others_prefixes(self) -> None:
        place = placement(2)
        prompt = text(1, 1000)
        assert place.place(request("a", prompt, salt="x")) == 0
        assert place.place(request("b", prompt, salt="y")) == 1
        assert place.place(request("c", prompt, salt="y")) == 1

    def test_work_is_given_back(self) -> None:
        place = placement(2)
        requests = group("a", 4, prefix=100, own=100)
        for r in requests:
            place.place(r)
        assert min(place.work_ms) > 0
        place.started("a0")
        place.ended(requests[0], [1, 2])
        for r in requests[1:]:
            place.ended(r, [])
            place.ended(r, [])  # an abort that crosses the end
        assert place.work_ms == pytest.approx([0.0, 0.0])

    def test_a_lost_engine_gets_nothing_until_it_is_back(self) -> None:
        place = placement(2)
        first, *others = group("a", 8, prefix=4000, own=16)
        engine = place.place(first)
        assert place.lose(engine) == ["a0"]
        assert {place.place(r) for r in [first, *others]} == {1 - engine}
        place.restore(engine)
        assert place.place(request("x", text(99, 64))) == engine
        for number in (0, 1):
            place.lose(number)
        with pytest.raises(RuntimeError, match="No engine is alive"):
            place.place(request("y", [1]))

    def test_calls_that_wait_move_to_where_nobody_does(self) -> None:
        place = placement(2)
        requests = group("a", 6, prefix=4000, own=16)  # they stay together for their prefix
        assert {place.place(r) for r in requests} == {0}
        assert place.moves(1) == [], "the prefix is worth more"
        others = group("b", 6, prefix=0, own=2000, key=7)
        assert Counter(place.place(r) for r in others) == {0: 2, 1: 4}
        for r in others:
            if place._placed[r.request_id].engine == 1:
                place.admitted(r.request_id)
                place.ended(r, [])
        moves = place.moves(1)
        assert [(move.source, move.target) for move in moves] == [(0, 1)] * len(moves)
        assert moves
        assert {move.request_id[0] for move in moves} == {"b"}, "who may compute the prefix of others stays with them"
        assert place.moves(1) == [], "somebody waits there now"
        assert place.work_ms[0] > 0

    def test_who_has_begun_stays(self) -> None:
        place = placement(2)
        requests = group("a", 4, prefix=0, own=2000)
        for r in requests:
            place.place(r)
        for r in requests[:2]:
            place.admitted(r.request_id)
        place.lose(1)
        place.restore(1)
        assert [move.request_id for move in place.moves(1)] == ["a2"]
        place.admitted("a2")
        assert place.moves(1) == []
        assert place.moves(0) == [], "nobody waits anywhere"

    def test_ahead_of_time_nothing_moves(self) -> None:
        place = placement(2)
        for i in range(4):
            place.place(request(f"r{i}", text(i, 2000), prefill_only=True))
        assert place.moves(0) == place.moves(1) == []

    def test_a_dead_engine_is_no_target(self) -> None:
        place = placement(2)
        place.lose(1)
        for r in group("a", 4, prefix=0, own=2000):
            place.place(r)
        assert place.moves(1) == []
        place.restore(1)
        assert len(place.moves(1)) == 2

    @settings(deadline=None)
    @given(st.integers(0, 10_000), st.integers(2, 4))
    def test_moves_pay_and_lose_nobody(self, seed: int, num_engines: int) -> None:
        rng, place = random.Random(seed), placement(num_engines)
        live: dict[str, EngineRequest] = {}
        waiting: set[str] = set()
        where: dict[str, int] = {}
        for i in range(60):
            r = request(
                f"r{i}", text(rng.randint(1, 3), 16 * rng.randint(0, 9)) + text(100 + i, rng.randint(1, 999)), 8
            )
            where[r.request_id] = place.place(r)
            live[r.request_id] = r
            waiting.add(r.request_id)
            for name in rng.sample(sorted(live), min(len(live), rng.randint(0, 2))):
                place.admitted(name)
                waiting.discard(name)
                if rng.random() < 0.7:
                    place.ended(live.pop(name), [])
                    where.pop(name)
            target = rng.randrange(num_engines)
            before = place.work_ms
            for move in place.moves(target):
                assert move.request_id in waiting
                assert (where[move.request_id], target) == (move.source, move.target)
                # Its whole prompt, counted twice, is the most that a prefix there can be worth.
                assert before[target] < before[move.source] + 2 * 0.5 * len(live[move.request_id].prompt_ids)
                where[move.request_id] = target
            assert sum(place.work_ms) == pytest.approx(sum(p.work_ms for p in place._placed.values()))
            assert {name: p.engine for name, p in place._placed.items()} == where
            assert {name for lane in place._waiting for name in lane} == waiting
            assert place._busy == {e for e in range(num_engines) if place._waiting[e]}

    def test_no_engines(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            placement(0)

    @settings(deadline=None)
    @given(st.integers(0, 10_000), st.integers(2, 8))
    def test_nobody_waits_for_more_than_a_prefix_is_worth(self, seed: int, num_engines: int) -> None:
        rng, place = random.Random(seed), placement(num_engines)
        live: dict[str, EngineRequest] = {}
        for i in range(40):
            r = request(f"r{i}", text(rng.randint(1, 3), 16 * rng.randint(0, 9)) + text(100 + i, rng.randint(1, 99)), 8)
            before = place.work_ms
            engine = place.place(r)
            live[r.request_id] = r
            # Its whole prompt, counted twice, is the most that a prefix can be worth.
            assert before[engine] <= min(before) + 2 * 0.5 * len(r.prompt_ids)
            if rng.random() < 0.5:
                place.ended(live.pop(rng.choice(list(live))), [])
            assert min(place.work_ms) > -1e-6

    def test_where_nothing_is_kept_a_prefix_is_worth_nothing(self) -> None:
        place = make_placer("affinity", 4, 100_000, COSTS, prefix_caching=False)
        requests = group("a", 8, prefix=4000, own=32)
        assert Counter(place.place(r) for r in requests) == {0: 2, 1: 2, 2: 2, 3: 2}


class TestLeastLoaded:
    def test_the_number_of_calls_is_all_that_counts(self) -> None:
        place = make_placer("least-loaded", 2, 100_000, COSTS)
        long, *others = [request("long", text(1, 4000)), *group("a", 3, prefix=4000, own=16)]
        assert [place.place(r) for r in (long, *others)] == [0, 1, 0, 1]
        place.ended(others[0], [])
        place.ended(others[0], [])  # an abort that crosses the end
        assert place.place(request("x", [1])) == 1
        assert place.moves(0) == place.moves(1) == []

    def test_idle_engines_take_turns(self) -> None:
        place = LeastLoaded(3)
        engines = []
        for r in group("a", 6, prefix=100, own=1):
            engines.append(place.place(r))
            place.ended(r, [])
        assert engines == [0, 1, 2, 0, 1, 2]

    def test_a_lost_engine_gets_nothing_until_it_is_back(self) -> None:
        place = LeastLoaded(2)
        requests = group("a", 4, prefix=0, own=1)
        assert [place.place(r) for r in requests] == [0, 1, 0, 1]
        assert place.lose(0) == ["a0", "a2"]
        assert [place.place(requests[i]) for i in (0, 2)] == [1, 1]
        place.restore(0)
        assert place.place(request("x", [1])) == 0
        for number in (0, 1):
            place.lose(number)
        with pytest.raises(RuntimeError, match="No engine is alive"):
            place.place(request("y", [1]))


class TestPrefixIndex:
    def test_finds_the_longest_prefix_of_each_engine(self) -> None:
        index = PrefixIndex(3, 1000, block_size=4)
        hashes = index.hashes(list(range(22)), "s")
        assert len(hashes) == 5
        index.insert(hashes[:2], 0)
        index.insert(hashes, 1)
        assert list(index.holders(hashes)) == [(5, {1}), (2, {0})]
        index.clear(1)
        assert list(index.holders(hashes)) == [(2, {0})]
        assert list(index.holders(index.hashes(list(range(22)), "t"))) == []

    def test_a_block_is_found_behind_the_same_text_only(self) -> None:
        index = PrefixIndex(1, 1000, block_size=4)
        index.insert(index.hashes([1, 2, 3, 4, 5, 6, 7, 8], ""), 0)
        assert list(index.holders(index.hashes([5, 6, 7, 8], ""))) == []

    def test_what_was_used_last_stays_and_ends_go_first(self) -> None:
        index = PrefixIndex(1, 6 * 4, block_size=4)
        old, new = index.hashes(text(1, 16), ""), index.hashes(text(2, 16), "")
        index.insert(old, 0)
        index.insert(new, 0)
        assert list(index.holders(new)) == [(4, {0})]
        assert list(index.holders(old)) == [(2, {0})]

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), max_size=12)), max_size=40))
    def test_remembers_no_more_than_fits_and_never_what_was_not_there(
        self, inserts: list[tuple[int, list[int]]]
    ) -> None:
        index = PrefixIndex(3, 2 * 5, block_size=2)
        inserted: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set(), 2: set()}
        for engine, tokens in inserts:
            index.insert(index.hashes(tokens, ""), engine)
            inserted[engine] |= {tuple(tokens[:end]) for end in range(2, len(tokens) + 1, 2)}
            for num_blocks, engines in index.holders(index.hashes(tokens, "")):
                for found in engines:
                    assert tuple(tokens[: 2 * num_blocks]) in inserted[found]
        for engine in range(3):
            held = [
                prefix
                for prefix in inserted[engine]
                if any(2 * n == len(prefix) and engine in found for n, found in index.holders(index.hashes(prefix, "")))
            ]
            assert len(held) <= 5
