import random

import pytest

from macaw_server.engine.types import CallClass
from macaw_server.kvcache import KVCache
from macaw_server.scheduler import AGEING_S, SchedulerConfig, SequenceStatus
from macaw_server.scheduler.scheduler import MAX_LOOKUPS_PER_STEP
from server.scheduler.engine_model import STOP, EngineModel


def chunks(batch):
    return [(c.sequence.request_id, c.start, c.length, c.samples) for c in batch.chunks]


def ids(sequences):
    return [sequence.request_id for sequence in sequences]


# -- batches ------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_prefilled_in_chunks_and_only_the_last_samples():
    engine = EngineModel(max_num_batched_tokens=16)
    engine.add("a", list(range(40)), max_tokens=2)
    assert [chunks(batch) for batch in engine.run()] == [
        [("a", 0, 16, False)],
        [("a", 16, 16, False)],
        [("a", 32, 8, True)],
        [("a", 40, 1, True)],
    ]
    engine.check_finished(engine.sequences["a"])
    engine.check_no_leak()


def test_decodes_come_first_then_prefills_then_admissions():
    engine = EngineModel(max_num_batched_tokens=16)
    engine.add("decode", [1, 2], max_tokens=9)
    engine.step()
    engine.add("prefill", [5] * 20)
    assert chunks(engine.step()) == [("decode", 2, 1, True), ("prefill", 0, 15, False)]
    engine.add("new", [7] * 20)
    assert chunks(engine.step()) == [
        ("decode", 3, 1, True),
        ("prefill", 15, 5, True),
        ("new", 0, 10, False),
    ]


def test_running_prefills_go_on_in_policy_order():
    engine = EngineModel(max_num_batched_tokens=16, max_prefill_chunk=10, policy="app")
    engine.add("background", [1] * 40, call_class=CallClass.BACKGROUND)
    engine.step()
    engine.add("latency", [2] * 40)
    assert chunks(engine.step()) == [("background", 10, 10, False), ("latency", 0, 6, False)]
    assert chunks(engine.step()) == [("latency", 6, 10, False), ("background", 20, 6, False)]


def test_max_prefill_chunk_leaves_room_for_others():
    engine = EngineModel(max_num_batched_tokens=16, max_prefill_chunk=10)
    engine.add("long", list(range(30)))
    engine.add("short", [50, 51, 52])
    assert chunks(engine.step()) == [("long", 0, 10, False), ("short", 0, 3, True)]


def test_no_more_sequences_run_than_configured():
    engine = EngineModel(max_num_seqs=2)
    for i in range(5):
        engine.add(f"r{i}", [i])
    engine.step()
    stats = engine.scheduler.stats()
    assert (stats.running, stats.waiting) == (2, 3)
    assert ids(engine.scheduler.sequences) == ["r0", "r1", "r2", "r3", "r4"]
    engine.run()
    assert engine.finished == ["r0", "r1", "r2", "r3", "r4"]


# -- in-flight prefixes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switches", "num_computed", "num_cached"),
    [
        ({}, 20 + 2 + 2 + 2, 54),
        ({"single_flight": False}, 3 * 20 + 2, 18),
        ({"prefix_caching": False}, 4 * 20, 0),
    ],
)
@pytest.mark.parametrize("max_prefill_chunk", [None, 7])
def test_what_is_computed_of_equal_prompts(switches, num_computed, num_cached, max_prefill_chunk):
    engine = EngineModel(max_num_batched_tokens=64, max_prefill_chunk=max_prefill_chunk, **switches)
    for i in range(3):
        engine.add(f"r{i}", list(range(20)))
    engine.run()
    engine.add("later", list(range(20)))
    engine.run()
    stats = engine.scheduler.stats()
    assert (stats.computed_tokens, stats.cached_tokens) == (num_computed, num_cached)
    for sequence in engine.sequences.values():
        engine.check_finished(sequence)
    engine.check_no_leak()


def test_followers_ride_along_in_the_step_of_their_owner():
    engine = EngineModel(max_num_batched_tokens=16)
    for i in range(3):
        engine.add(f"r{i}", [1, 2, 3, 4, 5, 6, 7, 8, 50 + i])
    batch = engine.step()
    assert chunks(batch) == [("r0", 0, 9, True), ("r1", 8, 1, True), ("r2", 8, 1, True)]
    assert [s.cached_tokens for s in batch.admitted] == [0, 8, 8]
    tables = [chunk.sequence.block_table for chunk in batch.chunks]
    assert tables[0][:4] == tables[1][:4] == tables[2][:4]


def test_followers_wait_for_a_long_prefix_and_hold_up_nobody():
    engine = EngineModel(max_num_batched_tokens=16, max_prefill_chunk=12)
    engine.add("owner", list(range(30)))
    engine.add("follower", [*range(26), 90, 91])
    engine.add("other", [99, 98])
    assert chunks(engine.step()) == [("owner", 0, 12, False), ("other", 0, 2, True)]
    assert engine.sequences["follower"].status is SequenceStatus.BLOCKED
    engine.step()
    assert engine.sequences["follower"].status is SequenceStatus.BLOCKED
    assert chunks(engine.step()) == [
        ("other", 3, 1, True),
        ("owner", 24, 6, True),
        ("follower", 26, 2, True),
    ]
    engine.run()
    assert engine.scheduler.stats().cached_tokens == 26


def test_tenants_do_not_wait_for_each_other():
    engine = EngineModel(max_num_batched_tokens=16, max_prefill_chunk=4)
    engine.add("a", [1] * 9, salt="tenant-a")
    engine.add("b", [1] * 9, salt="tenant-b")
    assert chunks(engine.step()) == [("a", 0, 4, False), ("b", 0, 4, False)]


@pytest.mark.parametrize("keep_pages", [True, False])
def test_the_next_in_line_takes_over_from_an_aborted_owner(keep_pages):
    engine = EngineModel(max_num_batched_tokens=16, max_prefill_chunk=4)
    for name in ("owner", "heir", "follower"):
        engine.add(name, list(range(20)))
    engine.step()
    engine.scheduler.abort("owner", keep_pages=keep_pages)
    assert chunks(engine.step()) == [("heir", 4, 4, False)], "what the owner had computed is not computed again"
    assert engine.sequences["follower"].status is SequenceStatus.BLOCKED
    engine.run()
    assert engine.finished == ["heir", "follower"]


def test_a_burst_of_followers_is_looked_up_a_few_at_a_time():
    engine = EngineModel(cache=(cache := CountingCache(64, 2)), max_num_batched_tokens=16, max_prefill_chunk=4)
    for i in range(1000):
        engine.add(f"r{i}", [*range(20), 50 + i], max_tokens=1)
    most = 8 + MAX_LOOKUPS_PER_STEP
    engine.step()
    assert cache.num_lookups == most
    num_steps = 1 + len(engine.run())
    assert cache.num_lookups <= 2 * 1000 + num_steps, "each is looked up when it blocks and when it is admitted"
    assert engine.scheduler.stats().computed_tokens == 20 + 1000


# -- memory -------------------------------------------------------------------------------------------------


class CountingCache(KVCache):
    num_lookups = 0

    def admit(self, *args, **kwargs):
        self.num_lookups += 1
        return super().admit(*args, **kwargs)


def test_those_that_merely_wait_cost_nothing():
    engine = EngineModel(cache=(cache := CountingCache(64, 2)), max_num_seqs=2)
    for i in range(1000):
        engine.add(f"r{i}", [i], max_tokens=20)
    for _ in range(15):
        engine.step()
    assert cache.num_lookups == 2


def test_out_of_pages_the_last_in_order_is_preempted_and_goes_on_where_it_was():
    engine = EngineModel(num_pages=8, page_size=2, policy="app", max_num_batched_tokens=32)
    engine.add("background", [1] * 6, max_tokens=9, call_class=CallClass.BACKGROUND)
    engine.add("latency", [2] * 4, max_tokens=11)
    batches = engine.run()
    preempted = [ids(batch.preempted) for batch in batches]
    assert ["background"] in preempted
    assert ["latency"] not in preempted
    assert [ids(batch.admitted) for batch in batches if batch.admitted] == [["latency", "background"]]
    assert engine.sequences["background"].num_preemptions == engine.scheduler.stats().preemptions == 1
    assert engine.sequences["background"].cached_tokens == 0, "reported once"
    resumed = [c for batch in batches[1:] for c in batch.chunks if c.length > 1]
    assert ids(c.sequence for c in resumed) == ["background"]
    assert resumed[0].start > 0, "it goes on from the prefix that survived"
    for sequence in engine.sequences.values():
        engine.check_finished(sequence)
    engine.check_no_leak()


def test_cached_tokens_are_reported_once_even_if_a_prefill_is_preempted():
    engine = EngineModel(num_pages=10, page_size=2, max_num_batched_tokens=8, max_prefill_chunk=1)
    engine.add("old", [1], max_tokens=15, min_tokens=15)
    engine.step()
    victim = engine.add("new", [2] * 15, max_tokens=1)
    batches = engine.run()
    assert [(ids(batch.admitted), ids(batch.preempted)) for batch in batches if batch.admitted or batch.preempted] == [
        (["new"], []),
        ([], ["new"]),
    ]
    assert (victim.num_preemptions, victim.cached_tokens) == (1, 0)


def test_a_sequence_alone_may_fill_the_pool_and_then_ends():
    engine = EngineModel(num_pages=4, page_size=2)
    engine.add("a", [1, 2, 3], max_tokens=50)
    engine.run()
    sequence = engine.sequences["a"]
    assert (len(sequence.token_ids), sequence.finish_reason) == (8, "length")
    assert engine.scheduler.stats().preemptions == 0


def test_a_head_of_line_that_finds_no_pages_is_not_overtaken():
    engine = EngineModel(num_pages=8, page_size=2, max_num_batched_tokens=32)
    engine.add("running", [1] * 6, max_tokens=4)
    engine.step()
    engine.add("big", [2] * 12)
    engine.add("small", [3])
    batches = engine.run()
    assert ids(next(batch.admitted for batch in batches if batch.admitted))[0] == "big"
    assert engine.finished[0] == "running"


def test_admission_leaves_a_page_for_each_running_sequence_to_grow_into():
    engine = EngineModel(num_pages=6, page_size=1, sampler=lambda tokens: 0)
    engine.add("old", [1, 2], max_tokens=4)
    engine.step()
    engine.add("new", [3, 4, 5], max_tokens=1)
    assert chunks(engine.step()) == [("old", 2, 1, True)], "3 pages are free, old may need one of them"
    assert ids(engine.step().preempted) == []
    engine.run()
    assert engine.finished == ["old", "new"]
    assert engine.scheduler.stats().preemptions == 0


def test_background_work_starts_within_the_ageing_bound_under_overload():
    engine = EngineModel(max_num_seqs=1, policy="app", num_pages=64)
    background = engine.add("background", [1, 2], call_class=CallClass.BACKGROUND)
    asked_s, started_s, num_added = engine.now_s, None, 0
    while started_s is None:
        for _ in range(2):  # twice what the engine can do
            engine.add(f"latency-{num_added}", [3, num_added], max_tokens=1)
            num_added += 1
        if background in engine.step().admitted:
            started_s = engine.now_s
        engine.now_s += 1.0
        assert num_added < 1000
    assert AGEING_S < started_s - asked_s < AGEING_S + 3.0


# -- ends ---------------------------------------------------------------------------------------------------


def test_stop_tokens_end_a_sequence_but_not_before_min_tokens():
    engine = EngineModel(sampler=lambda tokens: STOP)
    engine.add("stop", [1], stop=frozenset({STOP}), max_tokens=10)
    engine.add("late", [2], stop=frozenset({STOP}), max_tokens=10, min_tokens=3)
    engine.add("ignored", [3], max_tokens=5)
    engine.run()
    ends = {name: (s.num_outputs, s.finish_reason) for name, s in engine.sequences.items()}
    assert ends == {"stop": (1, "stop"), "late": (4, "stop"), "ignored": (5, "length")}


def test_max_model_len_ends_a_sequence():
    engine = EngineModel(max_model_len=6)
    engine.add("a", [1, 2, 3], max_tokens=10)
    engine.run()
    assert (engine.sequences["a"].num_outputs, engine.sequences["a"].finish_reason) == (3, "length")


def test_a_request_taken_up_again_goes_on_after_its_outputs():
    whole = EngineModel()
    whole.add("a", [1, 2, 3], max_tokens=6)
    whole.run()
    tokens = whole.sequences["a"].token_ids
    engine = EngineModel()
    engine.add("a", [1, 2, 3], max_tokens=6, output=tuple(tokens[3:7]))
    batch = engine.step()
    assert chunks(batch) == [("a", 0, 7, True)], "its outputs are part of the prompt"
    assert batch.admitted == [], "its cached tokens were reported in its first life"
    engine.run()
    assert engine.sequences["a"].token_ids == tokens
    assert engine.scheduler.stats().output_tokens == 2


@pytest.mark.parametrize(("output", "reason"), [((5, 6, STOP), "stop"), ((5, 6, 7, 8), "length")])
def test_a_request_whose_outputs_are_complete_is_finished_at_once(output, reason):
    engine = EngineModel()
    sequence = engine.add("a", [1, 2, 3], max_tokens=4, output=output, stop=frozenset({STOP}))
    assert (sequence.status, sequence.finish_reason) == (SequenceStatus.FINISHED, reason)
    assert not engine.scheduler.has_work


@pytest.mark.parametrize("keep_pages", [True, False])
def test_abort_works_in_every_state(keep_pages):
    engine = EngineModel(max_num_seqs=2, max_num_batched_tokens=8)
    engine.add("owner", list(range(20)))
    engine.add("unrelated", [90])
    engine.step()
    engine.add("follower", list(range(20)))
    engine.add("waiting", [80])
    engine.step()
    for name in ("waiting", "follower", "owner", "unrelated", "nobody", "owner"):
        engine.scheduler.abort(name, keep_pages=keep_pages)
        engine.cache.check()
    assert engine.scheduler.stats().pages_cached == (8 if keep_pages else 0)
    assert engine.run() == []
    engine.check_no_leak()


@pytest.mark.parametrize("seed", range(8))
def test_calls_cancelled_together_leave_nothing_that_only_they_used(seed):
    engine = EngineModel(num_pages=128, max_num_batched_tokens=64)
    engine.add("before", [7, 7, 7, 7], max_tokens=1)
    engine.run()
    for i in range(6):
        engine.add(f"mine{i}", [7] * 4 + [8] * 10 + [i] * (3 * i), max_tokens=20)
    engine.add("theirs", [7] * 4 + [8] * 4, max_tokens=1)
    for _ in range(3):
        engine.step()
    mine = [f"mine{i}" for i in range(6)]
    random.Random(seed).shuffle(mine)
    if seed % 2:
        engine.scheduler.abort(*mine, *mine, keep_pages=False)
    else:
        for name in mine:
            engine.scheduler.abort(name, keep_pages=False)
    engine.cache.check()
    stats = engine.scheduler.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert stats.pages_cached == 4, "what others used before and meanwhile stays, and nothing else"
    engine.check_no_leak()


def test_cancelling_an_owner_and_its_followers_keeps_nothing_for_them():
    engine = EngineModel(max_num_batched_tokens=16, max_prefill_chunk=4)
    for name in ("owner", "one", "two"):
        engine.add(name, list(range(20)))
    engine.step()
    assert engine.sequences["two"].status is SequenceStatus.BLOCKED
    engine.scheduler.abort("owner", "one", "two", keep_pages=False)
    assert engine.scheduler.stats().pages_cached == 0
    engine.check_no_leak()


def test_a_blocked_follower_can_be_aborted():
    engine = EngineModel(max_num_batched_tokens=16, max_prefill_chunk=4)
    engine.add("owner", list(range(20)))
    engine.add("follower", list(range(20)))
    engine.step()
    assert engine.sequences["follower"].status is SequenceStatus.BLOCKED
    engine.scheduler.abort("follower")
    engine.run()
    assert engine.finished == ["owner"]
    engine.check_no_leak()


def test_tokens_of_a_sequence_aborted_during_the_step_are_ignored():
    engine = EngineModel()
    engine.add("a", [1])
    engine.add("b", [2])
    batch = engine.scheduler.schedule(1.0)
    engine.scheduler.abort("a")
    assert engine.scheduler.update(batch, {"a": [5], "b": [6]}) == []
    assert engine.sequences["a"].token_ids == [1]
    assert engine.sequences["b"].token_ids == [2, 6]


def test_complete_sequences_stop_whatever_their_limits_say_even_without_a_token():
    engine = EngineModel()
    for name in "abc":
        engine.add(name, [1], max_tokens=1 if name == "c" else 9, min_tokens=5)
    batch = engine.scheduler.schedule(1.0)
    ended = engine.scheduler.update(batch, {"a": [5], "b": [], "c": [7]}, complete={"a", "b", "c"})
    assert [(s.request_id, s.finish_reason, s.num_outputs) for s in ended] == [
        ("a", "stop", 1),
        ("b", "stop", 0),
        ("c", "stop", 1),
    ]
    assert not engine.scheduler.has_work
    engine.check_no_leak()


# -- refusals and counters ----------------------------------------------------------------------------------


def test_what_can_never_run_is_refused_with_both_numbers():
    engine = EngineModel(num_pages=10, page_size=2, max_model_len=16)
    engine.add("fits", [1] * 15)
    with pytest.raises(ValueError, match=r"Prompt of 16 tokens .* the model's 16\. .* --max-model-len"):
        engine.add("long", [1] * 16)
    with pytest.raises(ValueError, match="has an empty prompt"):
        engine.add("empty", [])
    with pytest.raises(ValueError, match="Request id 'fits' is in use"):
        engine.add("fits", [1])
    small = EngineModel(num_pages=3, page_size=2, max_model_len=100)
    with pytest.raises(ValueError, match=r"Prompt of 6 tokens .* the KV cache's 6\. .* --kv-memory"):
        small.add("long", [1] * 6)
    small.add("fits", [1] * 5)
    small.run()
    assert small.finished == ["fits"]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((8, 4, 10), "max_num_seqs is 8 and max_num_batched_tokens 4"),
        ((0, 4, 10), "max_num_seqs is 0"),
        ((1, 4, 1), "max_model_len of 1"),
        ((1, 4, 10, 0), "max_prefill_chunk of 0"),
    ],
)
def test_impossible_limits_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(*limits)


def test_arrival_of_another_clock_counts_as_now():
    engine = EngineModel()
    engine.now_s = 100.0
    arrivals = {
        name: engine.add(name, [1], arrival_s=at).arrival_s
        for name, at in (("unset", 0.0), ("future", 500.0), ("real", 40.0))
    }
    assert arrivals == {"unset": 100.0, "future": 100.0, "real": 40.0}


def test_counters_add_up():
    engine = EngineModel(num_pages=16, page_size=2)
    engine.add("a", [1, 2, 3, 4, 5], max_tokens=3)
    engine.step()
    stats = engine.scheduler.stats()
    assert (stats.pages_used, stats.pages_cached, stats.pages_total) == (3, 0, 16)
    engine.run()
    engine.add("b", [1, 2, 3, 4, 5], max_tokens=2)
    engine.run()
    stats = engine.scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (10, 4, 5)
    assert stats.computed_tokens == 6
    assert (stats.pages_used, stats.pages_cached) == (0, 3)
    assert (stats.running, stats.waiting, stats.preemptions, stats.evicted_pages) == (0, 0, 0, 0)
