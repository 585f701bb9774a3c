"""Lower estimates of what calls take, and deadlines held against them."""

import pytest

from macaw.errors import DeadlineExceededError
from macaw.protocol import CallCompleted, CallTimings, ChatCompletionRequest, Target
from macaw_server.engine.types import CallClass
from macaw_server.service.pace import Pace, least_tokens
from server.service.harness import MODEL, ScriptedEngine, program, submit


def request(**fields):
    return ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}], **fields})


def completed(first_token_ms, completed_ms, num_tokens, num_choices=1):
    usage = {"completion_tokens": num_tokens}
    timings = CallTimings(ready_ms=10, started_ms=20, first_token_ms=first_token_ms, completed_ms=completed_ms)
    return CallCompleted(
        call_id="a", completion={"model": MODEL, "usage": usage, "choices": [{}] * num_choices}, timings=timings
    )


@pytest.mark.parametrize(
    ("fields", "least"),
    [
        ({"max_tokens": 50}, 1),
        ({"max_tokens": 50, "min_tokens": 7}, 7),
        ({"max_tokens": 50, "ignore_eos": True}, 50),
        ({"max_completion_tokens": 50, "ignore_eos": True}, 50),
        ({"ignore_eos": True}, 1),
        ({"max_tokens": 50, "ignore_eos": True, "stop": "x"}, 1),
        ({"max_tokens": 50, "ignore_eos": True, "stop_token_ids": [5], "min_tokens": 3}, 3),
        ({"max_tokens": 50, "min_tokens": 7, "response_format": {"type": "json_object"}}, 1),
    ],
)
def test_the_shortest_answer(fields, least):
    assert least_tokens(request(**fields)) == least


def test_half_of_the_fastest_that_was_seen():
    pace, long = Pace(), request(max_tokens=21, ignore_eos=True)
    assert pace.call_ms(long, MODEL, begun=False) == 0.0
    pace.completed(completed(30, 130, 11))
    pace.completed(completed(50, 100, 11))  # 5 ms per token
    pace.completed(completed(10, 11, 40, num_choices=4))
    pace.completed(completed(40, 41, 3))
    assert pace.call_ms(long, MODEL, begun=False) == pytest.approx((20 + 20 * 5) / 2)
    assert pace.call_ms(long, MODEL, begun=True) == pytest.approx(20 * 5 / 2)
    assert pace.call_ms(long, MODEL, begun=True, num_done=11) == pytest.approx(10 * 5 / 2)
    assert pace.call_ms(request(), MODEL, begun=True) == 0.0
    assert pace.call_ms(long, "another", begun=False) == 0.0


def test_the_queue_is_what_everybody_had_to_wait_lately():
    now = [100.0]
    pace = Pace(lambda: now[0])
    for queue_ms in (900.0, 700.0):
        pace.started("a", CallClass.GROUP, queue_ms)
    assert pace.queue_ms("a", CallClass.GROUP) == 0.0, "two are not enough to tell"
    pace.started("a", CallClass.GROUP, 800.0)
    assert pace.queue_ms("a", CallClass.GROUP) == 350.0
    assert pace.queue_ms("a", CallClass.LATENCY) == pace.queue_ms("b", CallClass.GROUP) == 0.0
    now[0] += 11.0
    assert pace.queue_ms("a", CallClass.GROUP) == 0.0


def chain(deadline_ms):
    made = program(("draft", "Draft it."), ("polish", "Polish: ", "$draft.out"))
    made.targets.append(Target(variable="polish.out", deadline_ms=deadline_ms))
    return made


@pytest.fixture
def costs(monkeypatch):
    """What each call is said to take."""
    said = {"call": 600.0, "queue": 250.0}
    monkeypatch.setattr(Pace, "call_ms", lambda *args, **kwargs: said["call"])
    monkeypatch.setattr(Pace, "queue_ms", lambda *args, **kwargs: said["queue"])
    return said


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(make, costs):
    engine = ScriptedEngine(held=True)
    service = make(engine)
    words = "deadline of 1400 ms cannot be met: .* at least 1450.0 ms, 250.0 of them in the queue"
    with pytest.raises(DeadlineExceededError, match=words):
        await submit(service, chain(1400))
    assert service.num_live_calls == 0
    assert engine.requests == []
    run = await submit(service, chain(1e7))
    assert not run.program.ended


async def test_a_program_ends_as_soon_as_its_deadline_is_out_of_reach(make, costs):
    engine = ScriptedEngine({"Draft": "a draft"}, held=True)
    run = await submit(make(engine), chain(1e6))
    costs["call"] = 2e6
    engine.release()
    await run.wait()
    assert isinstance(run.program.error, DeadlineExceededError)
    assert "deadline of 1e+06 ms cannot be met" in run.program.error.message
    assert "takes at least 4000000.0 ms" in run.program.error.message
    assert engine.active == []
