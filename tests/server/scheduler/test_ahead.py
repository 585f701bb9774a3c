"""Sequences of class AHEAD: they warm the cache, sample nothing, and yield to everybody."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from macaw_server.engine.types import CallClass
from macaw_server.scheduler import SequenceStatus
from server.scheduler.engine_model import EngineModel

AHEAD = {"call_class": CallClass.AHEAD, "prefill_only": True}


def chunks(batch):
    return [(c.sequence.request_id, c.start, c.length, c.samples) for c in batch.chunks]


def test_it_fills_the_cache_and_has_no_output():
    engine = EngineModel(max_num_batched_tokens=16)
    engine.add("ahead", list(range(20)), **AHEAD)
    assert [chunks(batch) for batch in engine.run()] == [[("ahead", 0, 16, False)], [("ahead", 16, 4, False)]]
    engine.check_finished(engine.sequences["ahead"])
    engine.add("call", list(range(22)))
    assert chunks(engine.step()) == [("call", 20, 2, True)]
    stats = engine.scheduler.stats()
    assert (stats.ahead_tokens, stats.prompt_tokens, stats.cached_tokens, stats.computed_tokens) == (20, 22, 20, 2)


def test_a_prefix_that_is_there_takes_no_step():
    engine = EngineModel()
    engine.add("ahead", list(range(8)), **AHEAD)
    engine.run()
    engine.add("again", list(range(8)), **AHEAD)
    batch = engine.step()
    assert (batch.chunks, [s.request_id for s in batch.finished]) == ([], ["again"])
    assert engine.sequences["again"].cached_tokens == 8
    engine.check_no_leak()


def test_beside_other_work_it_gets_the_rows_that_are_configured():
    for rows, beside in ((0, []), (5, [("ahead", 0, 4, False)])):
        engine = EngineModel(ahead_rows=rows)
        engine.add("call", [1, 2], max_tokens=3)
        engine.step()
        engine.add("ahead", [5] * 9, **AHEAD)
        assert chunks(engine.step()) == [("call", 2, 1, True), *beside]
        engine.run()
        engine.check_no_leak()


def test_a_call_takes_over_the_prefix_that_is_being_computed():
    engine = EngineModel(max_num_batched_tokens=16)
    engine.add("ahead", list(range(40)), **AHEAD)
    engine.step()
    engine.add("call", [*range(38), 90])
    assert chunks(engine.step()) == [("call", 16, 16, False)]
    assert engine.sequences["call"].cached_tokens == 16
    engine.run()
    assert engine.scheduler.stats().ahead_tokens == 18, "and what the call has no use for is computed after it"
    assert engine.scheduler.stats().preemptions == 0
    engine.check_no_leak()


def test_it_gives_its_slot_and_its_pages_to_calls():
    engine = EngineModel(num_pages=12, max_num_seqs=1, max_num_batched_tokens=4)
    engine.add("ahead", list(range(20)), **AHEAD)
    engine.step()
    engine.add("call", list(range(50, 66)), max_tokens=6)
    batch = engine.step()
    assert chunks(batch) == [("call", 0, 4, False)]
    assert engine.sequences["ahead"].status is SequenceStatus.WAITING
    engine.run()
    assert engine.finished == ["call", "ahead"]
    engine.check_no_leak()


def test_a_decode_takes_its_page():
    engine = EngineModel(num_pages=8, max_num_batched_tokens=8, ahead_rows=4)
    engine.add("call", [1] * 4, max_tokens=11)
    engine.step()
    engine.add("ahead", list(range(50, 60)), **AHEAD)
    engine.run()
    assert engine.finished == ["call", "ahead"]
    assert engine.scheduler.stats().preemptions == 0


def test_only_so_many_at_a_time():
    engine = EngineModel(max_num_batched_tokens=64, max_ahead_seqs=2)
    for i in range(5):
        engine.add(f"ahead{i}", [i] * 6, **AHEAD)
    assert [len(batch.chunks) for batch in engine.run()] == [2, 2, 1]


def test_it_never_samples():
    with pytest.raises(ValueError, match="only prefills run ahead"):
        EngineModel().add("ahead", [1], call_class=CallClass.AHEAD)


def test_an_owner_is_as_urgent_as_its_most_urgent_follower():
    engine = EngineModel(max_num_batched_tokens=40, max_prefill_chunk=8, policy="app", num_pages=128)
    engine.add("other", [9] * 30, call_class=CallClass.BACKGROUND)
    engine.step()
    engine.add("owner", list(range(30)), call_class=CallClass.BACKGROUND)
    while engine.sequences["owner"].status is not SequenceStatus.RUNNING:
        engine.step()
    engine.add("third", [7] * 30, call_class=CallClass.GROUP)
    engine.add("follower", [*range(28), 90], call_class=CallClass.LATENCY)
    engine.step()
    owner, third = engine.sequences["owner"], engine.sequences["third"]
    order = engine.scheduler._followers.order
    assert engine.sequences["follower"].status is SequenceStatus.BLOCKED
    assert order(owner, engine.now_s) < engine.scheduler._followers.order(third, engine.now_s)
    engine.scheduler.abort("follower")
    assert order(owner, engine.now_s) > engine.scheduler._followers.order(third, engine.now_s)


calls = st.tuples(st.integers(0, 12), st.integers(1, 20), st.integers(1, 8), st.sampled_from([*CallClass][:3]))


@pytest.mark.slow
@given(
    real=st.lists(calls, min_size=1, max_size=6),
    ahead=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 30)), max_size=6),
    max_num_seqs=st.integers(1, 4),
    extra=st.integers(0, 8),
    policy=st.sampled_from(["fcfs", "app"]),
)
def test_calls_run_as_if_it_were_not_there(real, ahead, max_num_seqs, extra, policy):
    """Step by step the same chunks of the same calls, whatever is prefilled ahead of others."""

    def timeline(others):
        engine = EngineModel(
            1000, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + extra, policy=policy
        )
        steps = []
        for i in range(400):
            for j, (_, num_tokens, max_tokens, kind) in enumerate(real):
                if real[j][0] == i:
                    prompt = [100 + j] * num_tokens
                    engine.add(f"call{j}", prompt, max_tokens, call_class=kind, arrival_s=1 + i)
            for j, (at, num_tokens) in enumerate(others):
                if at == i:
                    engine.add(f"ahead{j}", [j] * num_tokens, **AHEAD)
            engine.now_s = 1 + i
            if engine.scheduler.has_work:
                steps.append((i, [chunk for chunk in chunks(engine.step()) if chunk[0].startswith("call")]))
            elif i > 12:
                break
        engine.check_no_leak()
        return [step for step in steps if step[1]]

    assert timeline(ahead) == timeline([])
