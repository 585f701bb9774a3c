"""Prefill ahead and pipelining over a scripted engine: what is asked for and when, single flight, and the end of it."""

import asyncio

import pytest

from macaw.errors import CancelledError
from macaw.protocol import CallStarted
from macaw_server.engine.types import CallClass
from macaw_server.service.ahead import MIN_PREFIX_TOKENS
from server.service.harness import ScriptedEngine, chat_prompt, encode, program, submit, tokenizer, until

LONG = "The constant text of a prompt that is longer than a page, so that it is worth to be computed before. " * 3
ANSWER = "one two three four five six seven eight nine ten eleven twelve " * 6


def chain(**fields):
    return program(("draft", "Draft it."), ("polish", LONG, "Polish: ", "$draft.out"), targets=["polish.out"], **fields)


def ahead(engine):
    """What was asked for ahead of time."""
    return [request for request in engine.requests if request.prefill_only]


def text(request):
    return tokenizer().decode(request.prompt_ids)


async def settled(service):
    """Let every look come to its end."""
    await until(lambda: not any(run._ahead._tasks for run in service._live.values()))


@pytest.fixture
def make_ahead(make):
    return lambda engine, **config: make(engine, prefill_ahead=True, **config)


async def test_the_constant_beginning_is_asked_for_while_the_producer_works(make_ahead):
    engine = ScriptedEngine(held=True)
    run = await submit(make_ahead(engine), chain())
    await until(lambda: ahead(engine))
    (request,) = ahead(engine)
    assert chat_prompt(LONG + "Polish: ").startswith(text(request))
    assert len(request.prompt_ids) % 16 == 0
    assert len(encode(text(request))) > len(encode("<|role|>user\n" + LONG)) - 20
    assert (request.hints.call_class, request.salt) == (CallClass.AHEAD, run.tenant.salt)
    engine.release()
    await run.wait()
    assert run.state.status == "completed"
    assert run.state.totals.calls == 2
    assert len(run.program.calls["polish"].call.inputs) == 1


async def test_it_can_be_off(make):
    engine = ScriptedEngine()
    run = await submit(make(engine, prefill_ahead=False), chain())
    await run.wait()
    assert not ahead(engine)


@pytest.mark.parametrize("pipelining", [True, False])
async def test_a_prompt_follows_the_answer_that_it_waits_for(make_ahead, pipelining):
    engine = ScriptedEngine({"Draft": ANSWER}, held=True)
    service = make_ahead(engine, pipelining=pipelining)
    request = chain()
    request.calls[0].request.max_tokens = 300
    run = await submit(service, request)
    while run.program.calls["draft"].status != "completed":
        await settled(service)
        engine.step()
    asked = [text(request) for request in ahead(engine)]
    whole = chat_prompt(LONG + "Polish: " + ANSWER)
    assert all(whole.startswith(one) for one in asked)
    assert [len(one) for one in asked] == sorted({len(one) for one in asked}), "each goes on from the one before"
    assert ("eight nine" in asked[-1]) == pipelining
    assert 1 <= len(asked) <= 2 + len(encode(ANSWER)) // 32
    engine.release()
    await run.wait()


async def test_the_call_says_what_was_prefilled_ahead(make_ahead):
    engine = ScriptedEngine({"Draft": "a draft"}, held=True)
    service = make_ahead(engine)
    service._surroundings.ahead.observe_prefill(100, 50.0)
    run = await submit(service, chain())
    await until(lambda: ahead(engine))
    engine.deliver(ahead(engine)[0].request_id, [], "length", cached_tokens=16)
    num_ahead = len(ahead(engine)[0].prompt_ids)
    engine.step()
    while "polish" not in str(engine.active):
        engine.step()
        await asyncio.sleep(0)
    engine.deliver(f"{run.id}/polish/0", encode("x"), "length", cached_tokens=num_ahead)
    await run.wait()
    timings = run.state.calls[1].timings
    assert timings.prefilled_ahead_tokens == num_ahead - 16, "but for what was cached before"
    assert timings.ahead_saved_ms == pytest.approx((num_ahead - 16) / 2)
    assert timings.ahead_ms <= timings.ready_ms
    started = [event for event in run.program.events if isinstance(event, CallStarted)]
    assert [event.prefilled_ahead_tokens for event in started] == [0, num_ahead - 16]
    assert service.metrics.registry.get_sample_value("macaw_ahead_used_tokens_total") == num_ahead - 16


async def test_a_prefix_is_asked_for_once(make_ahead):
    engine = ScriptedEngine(held=True)
    service = make_ahead(engine)
    runs = [await submit(service, chain()) for _ in range(3)]
    await settled(service)
    assert len(ahead(engine)) == 1
    for run in runs[:2]:
        run.cancel(CancelledError("enough"))
    assert ahead(engine)[0].request_id not in engine.aborted, "the third still wants it"
    runs[2].cancel(CancelledError("enough"))
    assert ahead(engine)[0].request_id in engine.aborted
    assert not engine.active
    assert service._surroundings.ahead.num_live == 0


async def test_it_ends_with_its_call(make_ahead):
    engine = ScriptedEngine({"Draft": "a draft"}, held=True)
    service = make_ahead(engine)
    run = await submit(service, chain())
    await until(lambda: ahead(engine))
    (request,) = ahead(engine)
    while f"{run.id}/polish/0" not in engine.active:
        engine.deliver(f"{run.id}/draft/0", encode("a draft"), "length", cached_tokens=0)
        await until(lambda: f"{run.id}/polish/0" in engine.active)
    assert request.request_id in engine.active, "the engine hands over what it has"
    engine.deliver(f"{run.id}/polish/0", encode("x"), None, cached_tokens=0)
    assert request.request_id in engine.aborted
    engine.release()
    await run.wait()


async def test_short_beginnings_and_failures_cost_nothing(make_ahead):
    engine = ScriptedEngine(held=True)
    service = make_ahead(engine)
    run = await submit(service, program(("a", "A"), ("b", "B: ", "$a.out"), targets=["b.out"]))
    await settled(service)
    assert not ahead(engine)
    run.cancel(CancelledError("enough"))
    run = await submit(service, chain())
    await until(lambda: ahead(engine))
    engine.fail("engine_failed", "gone", [ahead(engine)[0].request_id])
    engine.release()
    await run.wait()
    assert run.state.status == "completed"


@pytest.mark.parametrize(("num_words", "asked"), [(1, False), (2, True)])
async def test_few_tokens_are_not_worth_a_request(make_ahead, num_words, asked):
    beginning = ""
    while len(encode(chat_prompt(beginning))) < MIN_PREFIX_TOKENS * num_words:
        beginning += "word "
    engine = ScriptedEngine(held=True)
    service = make_ahead(engine)
    run = await submit(service, program(("a", "A"), ("b", beginning, "$a.out"), targets=["b.out"]))
    await settled(service)
    assert bool(ahead(engine)) == asked
    run.cancel(CancelledError("enough"))


async def test_a_prompt_goes_on_as_the_client_sets_variables(make_ahead):
    engine = ScriptedEngine()
    service = make_ahead(engine)
    variables = {"first": {"external": True}, "second": {"external": True}}
    run = await submit(
        service, program(("a", LONG, "$first", "$second"), targets=["a.out"], variables=variables, stream=True)
    )
    await settled(service)
    run.set_variable("first", LONG.upper())
    await settled(service)
    await until(lambda: len(ahead(engine)) == 2)
    assert LONG.upper()[:100] in text(ahead(engine)[1])
    run.cancel(CancelledError("enough"))


async def test_an_engine_without_room_is_asked_when_calls_have_ended(make_ahead):
    engine = ScriptedEngine(held=True, ahead_rows=2)
    service = make_ahead(engine)
    others = [await submit(service, program(("a", f"Say {i}."), targets=["a.out"])) for i in range(2)]
    await until(lambda: len(engine.active) == 2)
    runs = [await submit(service, chain()) for _ in range(2)]
    await until(lambda: len(engine.active) == 4)
    await settled(service)
    assert not ahead(engine), "no step has a place for it"
    runs[0].cancel(CancelledError("enough"))
    for other in others:
        engine.deliver(f"{other.id}/a/0", encode("x"), "length", cached_tokens=0)
    await until(lambda: ahead(engine))
    assert len(ahead(engine)) == 1
    engine.release()
    await runs[1].wait()
    assert runs[1].state.status == "completed"


async def test_an_engine_without_rows_works_ahead_while_it_has_no_calls(make_ahead):
    engine = ScriptedEngine(held=True, ahead_rows=0)
    service = make_ahead(engine)
    run = await submit(
        service, program(("a", LONG, "$first"), targets=["a.out"], variables={"first": {"external": True}}, stream=True)
    )
    await until(lambda: ahead(engine))
    run.cancel(CancelledError("enough"))


async def test_who_finds_no_room_and_ends_is_forgotten(make_ahead):
    engine = ScriptedEngine(held=True, ahead_rows=1)
    service = make_ahead(engine)
    run = await submit(service, program(("a", "Say it."), targets=["a.out"]))
    await until(lambda: engine.active)
    waiting = await submit(service, chain())
    await settled(service)
    waiting.cancel(CancelledError("enough"))
    engine.release()
    await run.wait()
    await asyncio.sleep(0.03)
    assert not ahead(engine)
