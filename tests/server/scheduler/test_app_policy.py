"""What the policy `app` does for applications, on the engine's stand-in."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macaw_server.engine.types import CallClass
from macaw_server.scheduler import AGEING_S, Coefficients, SequenceStatus, StepTimeModel, policy
from macaw_server.scheduler.budget import MIN_CHUNK, StepBudget
from macaw_server.scheduler.fairness import MAX_PROGRAMS, AttainedService, FairShares
from server.scheduler.engine_model import EngineModel

GROUP, BACKGROUND = CallClass.GROUP, CallClass.BACKGROUND
EQUAL = Coefficients(fixed=10.0, token=1.0, sample=0.0, kv_token=0.0, score=0.0)
"""A step of one token takes 11 ms, and each further token 1."""


def engine(**limits) -> EngineModel:
    limits = {"policy": "app", "max_num_seqs": 1, "num_pages": 400, "max_num_batched_tokens": 64} | limits
    return EngineModel(sampler=lambda tokens: 0, step_time=StepTimeModel(EQUAL), **limits)


def order_of(run: EngineModel) -> list[str]:
    """Who ends, in order, where one runs at a time."""
    run.run()
    return run.finished


# -- order --------------------------------------------------------------------------------------------------


def test_the_shortest_remaining_path_goes_first():
    run = engine()
    for name, remaining in [("long", 4000.0), ("short", 100.0), ("middle", 900.0)]:
        run.add(name, [len(name)], program_id=name, work_tokens=remaining)
    assert order_of(run) == ["short", "middle", "long"]


def test_of_programs_that_may_grow_the_least_served_goes_first():
    run = engine()
    run.add("loop-0", [1], max_tokens=200, program_id="loop")
    run.run(1000)
    run.add("loop-1", [2], program_id="loop")
    run.add("new", [3], program_id="new")
    assert order_of(run) == ["loop-0", "new", "loop-1"]


def test_service_that_comes_while_a_call_waits_counts():
    run = engine()
    run.add("a-0", [1], max_tokens=200, program_id="a")
    run.step()
    run.add("a-1", [2], program_id="a")  # its program has next to nothing so far
    run.step()
    run.add("b", [3], program_id="b")
    run.run(1000)
    assert run.finished == ["a-0", "b", "a-1"]


def test_a_deadline_makes_a_call_due_when_it_has_to_start():
    run = engine(latency_slowdown=2.0)
    run.add("running", [1], max_tokens=20)
    # The prefill takes 11 ms, and each token at most 2 x 11: this one has to start after 0.1 s.
    run.add("deadline", [2], call_class=BACKGROUND, path_tokens=100.0, deadline_s=run.now_s + 2.311)
    run.add("late", [3], call_class=BACKGROUND, path_tokens=100.0, deadline_s=run.now_s + 60)
    run.add("critical", [4])
    assert run.sequences["deadline"].latest_start_s == pytest.approx(run.now_s + 0.1)
    assert order_of(run) == ["running", "deadline", "critical", "late"]


def test_a_group_stays_together():
    run = engine(max_num_seqs=1)
    for i in range(3):
        for group in ("a", "b"):
            arrival = 0.5 if group == "a" else 0.6
            run.add(f"{group}-{i}", [i, len(run.sequences)], call_class=GROUP, program_id=group, arrival_s=arrival)
    run.run()
    assert run.finished[:3] == ["a-0", "a-1", "a-2"]


@pytest.mark.parametrize(("task_groups", "first"), [(True, "chat"), (False, "map")])
def test_without_task_groups_their_calls_are_like_any_other(task_groups, first):
    run = engine(policy=policy.make_policy(task_groups=task_groups))
    run.add("map", [1], call_class=GROUP, arrival_s=0.5)
    run.add("chat", [2], arrival_s=0.6)
    run.add("background", [3], call_class=BACKGROUND, arrival_s=0.4)
    assert order_of(run) == [first, "map" if first == "chat" else "chat", "background"]


@pytest.mark.parametrize(("task_groups", "num_tokens"), [(True, 22), (False, 62)])
def test_without_task_groups_their_calls_do_not_give_way(task_groups, num_tokens):
    run = engine(max_num_seqs=4, latency_slowdown=3.0, policy=policy.make_policy(task_groups=task_groups))
    run.add("chat", [1, 2], max_tokens=4)
    run.step()
    run.add("map", list(range(100, 162)), call_class=GROUP)
    assert tokens_of(run.step(), "map") == num_tokens


# -- giving way ---------------------------------------------------------------------------------------------


def tokens_of(batch, prefix: str) -> int:
    return sum(c.length for c in batch.chunks if c.sequence.request_id.startswith(prefix))


@pytest.mark.parametrize(("slowdown", "most"), [(3.0, 22), (5.0, 44)])
def test_a_prefill_takes_what_a_critical_decode_leaves(slowdown, most):
    run = engine(max_num_seqs=4, latency_slowdown=slowdown)
    run.add("chat", [1, 2], max_tokens=4)
    run.step()
    run.add("map", list(range(100, 190)), call_class=GROUP)
    assert tokens_of(run.step(), "map") == most
    run.scheduler.abort("chat")
    assert tokens_of(run.step(), "map") == min(90 - most, 64)


def test_critical_prefills_do_not_give_way():
    run = engine(max_num_seqs=4, latency_slowdown=1.0)
    run.add("chat", [1, 2], max_tokens=4)
    run.step()
    run.add("other", list(range(100, 150)))
    assert tokens_of(run.step(), "other") == 50


def test_decodes_that_give_way_run_in_order_and_rest_until_they_are_due():
    run = engine(max_num_seqs=64, latency_slowdown=1.0)
    maps = [run.add(f"map-{i}", [9, i], max_tokens=500, call_class=GROUP) for i in range(40)]
    run.step()
    run.step()
    run.add("chat", [1, 2], max_tokens=50)
    run.step()
    before = [s.num_outputs for s in maps]
    for _ in range(5):
        assert tokens_of(run.step(), "map") == MIN_CHUNK
    gained = [s.num_outputs - b for s, b in zip(maps, before, strict=True)]
    assert gained == [5] * MIN_CHUNK + [0] * (40 - MIN_CHUNK)
    run.now_s += AGEING_S
    assert tokens_of(run.step(), "map") == 40


def test_of_equal_programs_one_ends_after_the_other():
    """Where nothing is critical, the first program in order is protected; what is left is filled up with the others."""
    run = engine(max_num_seqs=64, num_pages=4000, max_num_batched_tokens=256)
    for program in "ab":
        for i in range(20):
            prompt = [ord(program), i] * 30
            run.add(f"{program}-{i}", prompt, max_tokens=10, call_class=GROUP, program_id=program, work_tokens=200)
    batches = run.run()
    assert {name[0] for name in run.finished[:20]} == {"a"}
    assert any({c.sequence.request_id[0] for c in batch.chunks} == {"a", "b"} for batch in batches)


def test_nobody_is_admitted_to_do_nothing_but_critical_calls_are():
    run = engine(max_num_seqs=64, latency_slowdown=1.0)
    run.add("chat", [1, 2], max_tokens=50)
    run.step()
    for i in range(3):
        run.add(f"map-{i}", list(range(100 * i, 100 * i + 30)), call_class=GROUP)
    run.step()
    assert [s.status for n, s in run.sequences.items() if n.startswith("map")].count(SequenceStatus.RUNNING) == 1
    run.add("second", [7, 8])
    assert "second" in [s.request_id for s in run.step().admitted]


def test_who_is_due_gives_way_no_longer():
    run = engine(max_num_seqs=4, latency_slowdown=1.0)
    run.add("map", list(range(100, 190)), call_class=GROUP)
    run.add("chat", [1, 2], max_tokens=50)
    run.now_s += AGEING_S + 1
    run.step()
    assert tokens_of(run.step(), "map") == 90 - 64


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(1, 200)), max_size=12),
    st.integers(1, 300),
    st.floats(1, 10),
    st.builds(
        Coefficients, *[st.floats(0.01, 5)] * 2, st.floats(0, 1), st.floats(0, 0.1), st.floats(0, 0.01), st.floats(0, 5)
    ),
)
@settings(deadline=None)
def test_the_budget_is_used_up_and_not_exceeded(chunks, num_tokens, slowdown, coefficients):
    run = engine()
    critical = run.add("chat", [1, 2, 3])
    run.step()
    model = StepTimeModel(coefficients)
    budget = StepBudget(num_tokens, model, [critical], slowdown)
    given, exhausted = [], False
    for start, wanted in chunks:
        room = budget.room(start, wanted, gives_way=True)
        assert 0 <= room <= min(wanted, budget.num_tokens)
        assert room == 0 or not exhausted
        exhausted = budget.exhausted
        assert sum(given) >= MIN_CHUNK or room == min(wanted, budget.num_tokens) or room + sum(given) >= MIN_CHUNK
        budget.take(start, room, gives_way=True)
        given.append(room)
    left_ms = budget._left_ms
    assert left_ms >= 0 or sum(given) <= MIN_CHUNK or given[-1] <= MIN_CHUNK


# -- making way ---------------------------------------------------------------------------------------------


def test_a_critical_call_takes_the_place_of_the_latest_background_one():
    run = engine(max_num_seqs=2)
    for i in range(2):
        run.add(f"back-{i}", [5, i], max_tokens=50, call_class=BACKGROUND)
    run.step()
    run.add("chat", [1, 2])
    batch = run.step()
    assert [s.request_id for s in batch.preempted] == ["back-1"]
    assert [s.request_id for s in batch.admitted] == ["chat"]
    run.run()
    assert set(run.finished) == {"back-0", "back-1", "chat"}


def test_a_critical_call_takes_pages_of_others_until_it_has_enough():
    run = engine(max_num_seqs=8, num_pages=24)
    for i in range(4):
        run.add(f"back-{i}", [5, i, i, i, i, i], max_tokens=12, call_class=BACKGROUND)
    run.step()
    run.add("chat", list(range(20)), max_tokens=2)
    run.run()
    assert run.finished.index("chat") < 3
    assert run.scheduler.stats().preemptions >= 1


def test_nobody_makes_way_for_its_equal_nor_when_it_is_due():
    for now_s, call_class in [(0.0, CallClass.LATENCY), (AGEING_S + 1, BACKGROUND)]:
        run = engine(max_num_seqs=1)
        run.add("old", [5], max_tokens=10, call_class=call_class)
        run.step()
        run.now_s += now_s
        run.add("chat", [1, 2])
        assert not run.step().preempted


# -- tenants ------------------------------------------------------------------------------------------------


def served(run: EngineModel, tenant: str) -> int:
    return sum(len(s.token_ids) for s in run.sequences.values() if s.request.hints.tenant == tenant and s.num_outputs)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_tenants_share_by_weight_whatever_they_ask_for(weight):
    run = engine(max_num_seqs=2, num_pages=2000)
    for i in range(400):  # ten times as many, and all critical
        run.add(f"many-{i}", [1, i], max_tokens=10, tenant="many")
    for i in range(40):
        run.add(f"few-{i}", [2, i], max_tokens=10, tenant="few", tenant_weight=weight, call_class=BACKGROUND)
    while any(not s.num_outputs for s in run.sequences.values() if s.request.hints.tenant == "few"):
        run.step()
    assert served(run, "few") / served(run, "many") == pytest.approx(weight, rel=0.15)


def test_a_tenant_under_overload_of_another_waits_for_its_share_only():
    """The bound of docs/scheduling.md, in steps: one of the places, however many of the other's calls have aged."""
    run = engine(max_num_seqs=4, num_pages=2000)
    for i in range(300):
        run.add(f"many-{i}", [1, i], max_tokens=10, tenant="many")
    run.now_s += 100.0  # all of them are due
    for i in range(10):
        run.step()
        quiet = run.add(f"quiet-{i}", [2, i], max_tokens=3, tenant="quiet")
        steps = 0
        while not quiet.num_outputs:
            run.step()
            steps += 1
        assert steps <= 11


def test_a_tenant_far_ahead_gives_up_a_place(monkeypatch):
    monkeypatch.setattr(policy, "TENANT_LEAD", 80.0)
    run = engine(max_num_seqs=1)
    run.add("greedy", [1], max_tokens=90, tenant="greedy")
    run.step()
    run.add("other", [2], tenant="other")
    batches = [run.step() for _ in range(45)]
    assert [bool(batch.preempted) for batch in batches].index(True) == pytest.approx(40, abs=2)
    run.run(max_steps=120)  # and is not preempted in turn
    assert run.finished == ["other", "greedy"]


def test_idle_time_is_not_saved_up():
    shares = FairShares()
    shares.enter("busy")
    shares.charge("busy", 1000.0, 1.0)
    shares.enter("late")
    assert shares.service("late") == 1000.0
    shares.charge("late", 500.0, 2.0)
    shares.leave("busy")
    shares.leave("late")
    shares.enter("third")
    assert shares.service("third") == 1250.0, "where nobody waits, the most that anybody had"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["enter", "leave", "charge"]), st.floats(1, 9))))
def test_service_never_falls_and_newcomers_are_not_ahead(operations):
    shares, present, known = FairShares(), dict.fromkeys("abc", 0), set()
    for name, operation, amount in operations:
        before = {tenant: shares.service(tenant) for tenant in "abc"}
        if operation == "enter":
            others = [before[t] for t in "abc" if present[t]]
            shares.enter(name)
            known.add(name)
            present[name] += 1
            if present[name] == 1 and others:
                assert shares.service(name) == max(before[name], min(others))
        elif operation == "leave" and present[name]:
            shares.leave(name)
            present[name] -= 1
        elif operation == "charge" and name in known:  # whoever runs need not wait
            shares.charge(name, amount, 1.0)
        assert len(shares._heap) <= 3
        assert all(shares.service(tenant) >= before[tenant] for tenant in "abc")


def test_the_memory_of_programs_is_bounded():
    attained = AttainedService()
    for i in range(MAX_PROGRAMS + 5):
        attained.charge(f"p{i}", 1.0)
        attained.charge("always", 1.0)
    assert attained["p0"] == 0.0
    assert attained["always"] == MAX_PROGRAMS + 5
    assert attained[f"p{MAX_PROGRAMS + 4}"] == 1.0


def test_work_done_twice_is_charged_once():
    run = engine(max_num_seqs=2, num_pages=12)
    for name in "ab":
        run.add(name, [ord(name)] * 8, max_tokens=9)
    run.run()
    assert run.scheduler.stats().preemptions > 0
    assert run.scheduler.policy.shares.service("") == 2 * 8 + 2 * (2 * 9)
    assert math.isinf(run.sequences["a"].latest_start_s)
