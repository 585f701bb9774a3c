"""Drafts: which are worth running, what a guess's record says, and what becomes of them in a step."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macaw_server.scheduler.speculation import NO_GUESS, Drafter, Guess, draft_lengths
from server.scheduler.engine_model import STOP, EngineModel, NoisyOracle

GUESSES = st.lists(st.builds(Guess, st.integers(0, 3).map(lambda n: [0] * n), st.floats(0, 1)), min_size=1, max_size=4)


def tokens_per_time(guesses, lengths, num_sampled, ridge):
    brought = sum(g.acceptance ** (j + 1) for g, n in zip(guesses, lengths, strict=True) for j in range(n))
    return (num_sampled + brought) / (ridge + num_sampled + sum(lengths))


@given(GUESSES, st.integers(0, 4), st.floats(0.5, 200))
@settings(max_examples=100, deadline=None)
def test_no_other_lengths_promise_more_tokens_per_time(guesses, others, ridge):
    num_sampled = len(guesses) + others
    lengths = draft_lengths(guesses, num_sampled=num_sampled, ridge=ridge, budget=99)
    best = max(
        tokens_per_time(guesses, any_lengths, num_sampled, ridge)
        for any_lengths in product(*(range(len(guess.token_ids) + 1) for guess in guesses))
    )
    assert tokens_per_time(guesses, lengths, num_sampled, ridge) == pytest.approx(best)


@given(GUESSES, st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_the_budget_holds(guesses, budget):
    lengths = draft_lengths(guesses, num_sampled=len(guesses), ridge=1e9, budget=budget)
    assert sum(lengths) <= budget
    assert all(n <= len(guess.token_ids) for n, guess in zip(lengths, guesses, strict=True))


def test_a_full_batch_runs_sure_drafts_only():
    guess = Guess([1, 2, 3, 4], 0.6)
    alone = draft_lengths([guess], num_sampled=1, ridge=8, budget=99)
    assert alone == [3]
    assert draft_lengths([guess] * 32, num_sampled=32, ridge=8, budget=999) == [0] * 32
    assert sum(draft_lengths([guess._replace(acceptance=0.99)] * 32, num_sampled=32, ridge=8, budget=999)) > 32


class Ramp:
    """Proposes the numbers that follow, or always the wrong ones."""

    def __init__(self, right):
        self.right = right

    def propose(self, token_ids, limit):
        return [token_ids[-1] + i + 1 if self.right else -1 for i in range(limit)]


def guesses(drafter, num_tokens):
    """Those that a drafter makes, by the number of tokens of the sequence."""
    found = {n: drafter.guess(list(range(n)), 4) for n in range(1, num_tokens)}
    return {n: guess for n, guess in found.items() if guess.token_ids}


def test_guesses_are_scored_though_none_is_run():
    trusted, doubted = guesses(Drafter(Ramp(True)), 200), guesses(Drafter(Ramp(False)), 200)
    assert trusted[max(trusted)].acceptance > 0.95
    assert doubted[max(doubted)].acceptance < 0.01


def test_who_is_wrong_is_asked_ever_more_rarely_and_who_is_right_in_every_step():
    assert list(guesses(Drafter(Ramp(False)), 40)) == [1, 3, 7, 15, 23, 31, 39]
    ramp = Ramp(False)
    drafter = Drafter(ramp)
    guesses(drafter, 40)
    ramp.right = True
    assert drafter.guess(list(range(46)), 4) is NO_GUESS
    after = [n for n in range(47, 64) if drafter.guess(list(range(n)), 4).token_ids]
    assert after == [47, *range(55, 64)], "one guess that holds is enough"


def test_tokens_after_a_wrong_guess_say_nothing():
    drafter = Drafter(Ramp(True))
    before = drafter.guess([1], 4).acceptance
    after = drafter.guess([1, 2, 9, 4, 5], 4).acceptance  # not before it has rested
    hit = before + Drafter.WEIGHT * (1 - before)
    assert after == pytest.approx(hit - Drafter.WEIGHT * hit)


def speculating(noise=0.0, sampler=lambda tokens: len(tokens) % 4, **limits):
    return EngineModel(
        sampler=sampler, max_draft_tokens=4, make_proposer=lambda request: NoisyOracle(noise, sampler), **limits
    )


def test_drafts_that_hold_save_steps():
    engine = speculating()
    engine.add("a", [1, 2, 3], max_tokens=11)
    batches = engine.run()
    assert [batch.chunks[0].num_samples for batch in batches] == [1, 5, 5], "the prompt, 4 drafts + 1, 4 drafts + 1"
    engine.check_finished(engine.sequences["a"])
    stats = engine.scheduler.stats()
    assert (stats.steps, stats.output_tokens, stats.draft_tokens, stats.accepted_tokens) == (0, 11, 8, 8)
    engine.check_no_leak()


@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_drafts_end_before_the_last_token(max_tokens):
    engine = speculating()
    engine.add("a", [1, 2, 3], max_tokens=max_tokens)
    engine.run()
    engine.check_finished(engine.sequences["a"])
    assert engine.scheduler.stats().accepted_tokens == engine.scheduler.stats().draft_tokens


def test_drafts_end_before_a_stop_token():
    engine = speculating(sampler=lambda tokens: STOP if len(tokens) == 7 else 1)
    engine.add("a", [1, 2, 3], max_tokens=20, stop=frozenset({STOP}))
    batches = engine.run()
    assert [batch.chunks[0].drafts for batch in batches] == [(), (1, 1, 1)]
    assert engine.sequences["a"].finish_reason == "stop"
    assert engine.sequences["a"].num_outputs == 5


def test_rejected_drafts_leave_no_page_and_nothing_in_the_tree():
    engine = speculating(noise=1.0, sampler=lambda tokens: 7)
    engine.add("a", [1, 2, 3], max_tokens=6)
    engine.step()
    num_drafted = 0
    for _ in range(4):
        num_drafted += bool(engine.step().chunks[0].drafts)
        assert engine.scheduler.stats().pages_used == -(-engine.sequences["a"].num_computed // 2)
    assert num_drafted > 1
    engine.run()
    assert engine.scheduler.stats().accepted_tokens == 0
    assert engine.scheduler.stats().pages_cached == 4, "3 tokens of the prompt and 5 outputs that were computed"


def test_drafts_take_no_page_that_a_running_sequence_may_need():
    engine = speculating(num_pages=8, page_size=1)
    engine.add("a", [1, 2], max_tokens=6)
    engine.add("b", [3, 4], max_tokens=6)
    engine.step()
    batch = engine.step()  # 4 pages hold the prompts, 2 the decodes, and one is left to each
    assert [chunk.drafts for chunk in batch.chunks] == [(), ()]
    assert engine.scheduler.stats().preemptions == 0


def test_prefills_and_admissions_come_before_drafts():
    engine = speculating(max_num_batched_tokens=16)
    engine.add("decodes", [1, 2, 3], max_tokens=20)
    engine.step()
    engine.add("prefills", list(range(14)))
    batch = engine.step()
    assert [(c.length, len(c.drafts)) for c in batch.chunks] == [(1, 1), (14, 0)]


def test_an_abort_in_the_step_frees_the_pages_of_drafts():
    engine = speculating()
    engine.add("a", [1, 2, 3], max_tokens=20)
    engine.step()
    batch = engine.scheduler.schedule(2.0)
    assert batch.chunks[0].drafts
    engine.scheduler.abort("a")
    engine.cache.check()
    assert engine.scheduler.update(batch, {"a": [0, 1]}) == []
    engine.check_no_leak()
