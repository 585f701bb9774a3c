"""One call, its engine said by hand: several tokens at once, stop strings, and what arrives late."""

import pytest

from macaw.protocol import CallDelta, CallStarted
from macaw_server.engine.types import EngineOutput
from server.service.harness import EOS, ScriptedEngine, call, encode, program, submit, until


class Hand:
    """A running call and the hand that feeds it."""

    def __init__(self, engine, run):
        self.engine, self.run = engine, run
        self.request_id = engine.active[0]

    def give(self, text, *more, **kwargs):
        self.engine.deliver(self.request_id, [*encode(text), *more], **kwargs)

    @property
    def deltas(self):
        chunks = [event.chunk["choices"][0] for event in self.run.program.events if isinstance(event, CallDelta)]
        return [choice["delta"].get("content", "") for choice in chunks]

    @property
    def answer(self):
        completion = self.run.program.calls["a"].completion
        choice = completion["choices"][0]
        return choice["message"]["content"], choice["finish_reason"], completion["usage"]["completion_tokens"]


@pytest.fixture
async def start(make):
    async def start_call(**request):
        engine = ScriptedEngine(held=True)
        run = await submit(make(engine), program(calls=[call("a", "Hi", **request)], targets=["a.out"]))
        await until(lambda: engine.active)
        return Hand(engine, run)

    return start_call


async def test_several_tokens_in_one_output(start):
    hand = await start()
    hand.give("one two", cached_tokens=0)
    hand.give(" three", EOS, finish_reason="stop")
    assert hand.answer == ("one two three", "stop", len(encode("one two")) + len(encode(" three")) + 1)
    assert hand.deltas == ["", "one two", " three"]


async def test_a_stop_string_within_an_output_cuts_text_and_usage(start):
    hand = await start(stop="STOP")
    hand.give("one", cached_tokens=0)
    hand.give("twoSTOPthree")
    text, reason, num_tokens = hand.answer
    assert (text, reason) == ("onetwo", "stop")
    assert num_tokens < len(encode("one")) + len(encode("twoSTOPthree"))
    assert hand.engine.aborts == [([hand.request_id], True)], "a normal end: what it has computed stays"


async def test_a_stop_string_in_the_last_output_wins_over_its_reason(start):
    hand = await start(stop="STOP")
    hand.give("oneSTOP", cached_tokens=0, finish_reason="length")
    assert hand.answer[:2] == ("one", "stop")


async def test_what_might_have_become_a_stop_string_is_said_at_the_end(start):
    hand = await start(stop="STOP")
    hand.give("oneST", cached_tokens=0)
    assert hand.deltas == ["", "one"]
    hand.give("", EOS, finish_reason="stop")
    assert hand.answer[:2] == ("oneST", "stop")
    assert "".join(hand.deltas) == "oneST"


async def test_a_stop_token_has_no_text(start):
    word = encode("word")[0]
    hand = await start(stop_token_ids=[word])
    hand.give("one", cached_tokens=0)
    hand.give("", word, finish_reason="stop")
    assert hand.answer == ("one", "stop", len(encode("one")) + 1)


async def test_the_call_starts_once_and_without_a_token(start):
    hand = await start()
    hand.give("", cached_tokens=3)
    assert hand.deltas == []
    assert hand.run.program.calls["a"].timings.first_token_ms is None
    hand.give("one", cached_tokens=5)
    started = [event for event in hand.run.program.events if isinstance(event, CallStarted)]
    assert [event.cached_tokens for event in started] == [3]
    hand.give("", EOS, finish_reason="stop")
    usage = hand.run.program.calls["a"].completion["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_outputs_that_cross_the_end_change_nothing(start):
    hand = await start(n=2)
    _, late, _ = hand.engine._active[hand.engine.active[1]]
    hand.engine.fail("engine_failed", "gone", hand.engine.active[:1])
    num_events = len(hand.run.program.events)
    late(EngineOutput(hand.request_id, encode("late")))
    assert len(hand.run.program.events) == num_events
