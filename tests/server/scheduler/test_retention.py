"""What the scheduler has the cache keep: for calls that wait, for calls to come, for as long as there are any."""

from __future__ import annotations

import pytest

from macaw_server.engine.types import CallClass, Reuse
from macaw_server.scheduler import AppPolicy, FcfsPolicy
from server.scheduler.engine_model import EngineModel

AHEAD = {"call_class": CallClass.AHEAD, "prefill_only": True}


def text(key: int, length: int) -> list[int]:
    return list(range(100 * key, 100 * key + length))


def claims(engine: EngineModel) -> int:
    assert engine.cache.retention is not None
    return engine.cache.retention.num_claims


def cached(engine: EngineModel, tokens: list[int]) -> int:
    return len(engine.cache.tree.match_prefix(tokens, "", 99).pages) * engine.cache.page_size


@pytest.mark.parametrize(("eviction", "num_kept"), [("value", 8), ("lru", 0)])
def test_what_a_call_to_come_needs_outlives_what_came_later(eviction: str, num_kept: int) -> None:
    engine = EngineModel(num_pages=16, eviction=eviction)  # type: ignore[arg-type]
    engine.add("first", text(1, 8), program_id="p", reuse=(Reuse(8, 1),), may_return=False)
    engine.run()
    for i in range(2, 5):
        engine.add(f"other{i}", text(i, 10), program_id=f"o{i}", may_return=False)
        engine.run()
    assert cached(engine, text(1, 8)) == num_kept
    engine.check_no_leak()


def test_a_finished_branch_goes_before_what_was_used_earlier() -> None:
    engine = EngineModel(num_pages=16)
    engine.add("plain", text(1, 8), program_id="r1", may_return=True)
    engine.run()
    engine.add("branch", text(2, 8), program_id="p", may_return=False)
    engine.run()
    engine.add("next", text(3, 22), program_id="q", may_return=False)
    engine.step()
    assert cached(engine, text(1, 8)) == 8
    assert cached(engine, text(2, 8)) < 8


def test_an_ended_program_keeps_nothing() -> None:
    engine = EngineModel()
    for i in range(3):
        engine.add(f"r{i}", text(1, 6) + text(2 + i, 6), program_id="p", reuse=(Reuse(6, 1), Reuse(None, 3)))
    engine.run()
    assert claims(engine) == 4, "the common beginning once, and each whole path"
    engine.scheduler.let_go(["p"])
    assert claims(engine) == 0
    engine.check_no_leak()


def test_the_call_for_which_it_was_kept_ends_that() -> None:
    engine = EngineModel()
    engine.add("a", [*text(1, 6), 7], program_id="p", reuse=(Reuse(6, 1),))
    engine.run()
    assert claims(engine) == 1
    engine.add("b", [*text(1, 6), 8], program_id="p")
    assert claims(engine) == 2, "and it waits"
    engine.step()
    assert claims(engine) == 0
    engine.run()
    engine.check_no_leak()


@pytest.mark.parametrize("keep", [True, False])
def test_a_call_that_waits_keeps_its_prefix_until_it_is_admitted_or_gone(keep: bool) -> None:
    engine = EngineModel(num_pages=16, max_num_seqs=1)
    engine.add("before", text(1, 8), max_tokens=1)
    engine.run()
    engine.add("busy", text(2, 4), max_tokens=9)
    engine.step()
    engine.add("waits", [*text(1, 8), 5])
    assert claims(engine) == 1
    engine.scheduler.abort("waits", keep_pages=keep)
    assert claims(engine) == 0
    engine.run()
    assert claims(engine) == 0
    engine.check_no_leak()


def test_a_cancelled_call_has_no_claims_and_one_that_a_stop_string_ends_has() -> None:
    for keep in (False, True):
        engine = EngineModel()
        engine.add("a", text(1, 6), 9, program_id="p", reuse=(Reuse(None, 1),))
        engine.step()
        engine.scheduler.abort("a", keep_pages=keep)
        assert claims(engine) == int(keep)


def test_what_was_prefilled_ahead_is_kept_until_it_is_let_go() -> None:
    engine = EngineModel(num_pages=16)
    engine.add("ahead", text(1, 8), **AHEAD)
    engine.run()
    assert claims(engine) == 1
    for i in range(2, 5):
        engine.add(f"other{i}", text(i, 10), may_return=False, program_id=f"o{i}")
        engine.run()
    assert cached(engine, text(1, 8)) == 8
    engine.scheduler.let_go(["ahead"])
    assert claims(engine) == 0
    engine.add("big", text(9, 22), program_id="o")
    engine.run()
    assert cached(engine, text(1, 8)) < 8, "nobody used it, so it went first"
    engine.check_no_leak()


def test_claims_do_not_stand_in_the_way_of_a_call_that_fits_the_pool() -> None:
    engine = EngineModel(num_pages=16)
    for i in range(2):
        engine.add(f"r{i}", text(1 + i, 14), program_id=f"p{i}", reuse=(Reuse(None, 1),))
        engine.run()
    assert claims(engine) == 2
    engine.add("all", text(5, 28), max_tokens=4)
    engine.run()
    assert "all" in engine.finished
    engine.check_no_leak()


def test_priority_counts() -> None:
    engine = EngineModel()
    app, hints = AppPolicy(), {"program_id": "p", "work_tokens": 50.0}
    critical = engine.add("c", [1], **hints)
    background = engine.add("b", [2], call_class=CallClass.BACKGROUND, **hints)
    growing = engine.add("g", [3], program_id="g")
    assert [app.claim_steps(s, in_program=True) for s in (critical, background, growing)] == [0.0, 1.0, 0.0]
    app.attained.charge("g", 64 * 2**4)
    assert app.claim_steps(growing, in_program=True) == 1.0
    assert app.claim_steps(growing, in_program=False) == 0.0
    assert FcfsPolicy().claim_steps(background, in_program=True) == 0.0


def test_by_recency_nothing_is_claimed() -> None:
    engine = EngineModel(eviction="lru")
    engine.add("a", text(1, 6), program_id="p", reuse=(Reuse(None, 1),))
    engine.add("ahead", text(2, 6), **AHEAD)
    engine.run()
    engine.scheduler.let_go(["p", "ahead"])
    assert engine.cache.retention is None
    engine.check_no_leak()
