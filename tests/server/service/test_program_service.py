"""The life of programs over a scripted engine: growth, failure, cancelling, events."""

import asyncio

import pytest

from macaw.errors import CancelledError, ContextLengthError, DeadlineExceededError, InvalidProgramError
from macaw.protocol import Call, Hints, ProgramGrowth, Target, Variable
from macaw_server.engine.types import CallClass
from server.service.harness import (
    CHAIN,
    MAX_MODEL_LEN,
    MODEL,
    OTHER,
    ScriptedEngine,
    call,
    chain,
    chat_prompt,
    encode,
    finished,
    program,
    submit,
    tokenizer,
    until,
)


async def test_the_answer_of_one_call_is_in_the_prompt_of_the_next(make):
    engine = ScriptedEngine(CHAIN)
    run = await finished(make(engine), chain())
    assert engine.prompts() == [chat_prompt("Draft it."), chat_prompt("Polish: a draft")]
    assert run.state.result() == {"polish.out": "a polished text"}
    assert [event.sequence for event in run.program.events] == list(range(len(run.program.events)))
    assert run.state.critical_path == ["draft", "polish"]
    assert run.state.model == MODEL


async def test_prompts_are_the_tokens_of_the_whole_text(make):
    engine = ScriptedEngine({"start": "alpha bet"})
    await finished(make(engine), program(("a", "start"), ("b", "x", "$a.out", "y"), targets=["b.out"]))
    whole = tokenizer().encode(chat_prompt("xalpha bety"), add_special_tokens=False)
    assert engine.requests[1].prompt_ids == whole


async def test_scheduler_hints_come_from_the_graph(make):
    engine = ScriptedEngine()
    maps = [(f"map{i}", f"Part {i}") for i in range(3)]
    reduce = ("reduce", *(f"$map{i}.out" for i in range(3)))
    run = await finished(make(engine), program(*maps, reduce, targets=["reduce.out"]))
    hints = [request.hints for request in engine.requests]
    assert [h.call_class for h in hints] == [CallClass.GROUP] * 3 + [CallClass.LATENCY]
    assert [h.depth for h in hints] == [0, 0, 0, 1]
    assert {h.group for h in hints[:3]} == {"reduce"}
    assert {h.program_id for h in hints} == {run.id}


async def test_hints_of_plain_requests_override_the_graph(make):
    engine = ScriptedEngine()
    service = make(engine)
    one = program(("0", "Hi"), targets=["0.out"])
    for hints in (Hints(app="x", group="g", stage=2), Hints(app="x", objective="latency"), Hints()):
        await finished(service, one, hints=hints)
    await finished(service, one, hints=Hints(app="x"), tenant=OTHER)
    first, second, third, other = (request.hints for request in engine.requests)
    assert (first.program_id, first.call_class, first.group, first.depth) == (
        "anonymous/x",
        CallClass.GROUP,
        "g",
        2,
    )
    assert (second.program_id, second.call_class) == ("anonymous/x", CallClass.LATENCY)
    assert third.program_id.startswith("prog-")
    assert other.program_id == "other/x"
    assert engine.requests[3].salt == OTHER.salt != engine.requests[0].salt


async def test_max_concurrency_bounds_the_calls_at_work(make):
    engine = ScriptedEngine(held=True)
    calls = [(str(i), f"Part {i}") for i in range(5)]
    run = await submit(make(engine), program(*calls, targets=[f"{i}.out" for i in range(5)], max_concurrency=2))
    most = 0
    while not run.program.ended:
        await asyncio.sleep(0)
        most = max(most, len(engine.active))
        engine.step()
    assert most == 2
    assert run.program.status == "completed"


class TestGrowth:
    async def test_an_open_program_grows_by_external_variables_and_calls(self, make):
        engine = ScriptedEngine({"Draft": "a draft", "yes": "agreed"})
        service = make(engine)
        run = await submit(
            service, program(("draft", "Draft it."), variables={"verdict": {"external": True}}, open=True)
        )
        await until(lambda: "draft.out" in run.values)
        judge = call("judge", "$draft.out", "? ", "$verdict")
        growth = ProgramGrowth(calls=[Call.model_validate(judge)], targets=[Target(variable="judge.out")], close=True)
        await service.grow(run, growth)
        assert len(engine.requests) == 1
        run.set_variable("verdict", "yes")
        await run.wait()
        assert run.state.result() == {"judge.out": "agreed"}
        assert engine.prompts()[1] == chat_prompt("a draft? yes")

    async def test_a_growth_whose_calls_are_ready_at_once_starts_them(self, make):
        engine = ScriptedEngine()
        service = make(engine)
        run = await submit(service, program(("first", "Hi"), open=True))
        await until(lambda: "first.out" in run.values)
        growth = ProgramGrowth(
            calls=[Call.model_validate(call("next", "$first.out", "!"))], targets=[Target(variable="next.out")]
        )
        await service.grow(run, growth)
        await until(lambda: "next.out" in run.values)
        await service.grow(run, ProgramGrowth(close=True))
        assert set(run.state.result()) == {"next.out"}

    async def test_a_refused_growth_changes_nothing(self, make):
        engine = ScriptedEngine()
        service = make(engine)
        run = await submit(service, program(open=True))
        before = run.state.model_dump(exclude={"duration_ms"})
        fits, too_long = call("fits", "Hi"), call("long", "word " * MAX_MODEL_LEN)
        growth = ProgramGrowth(calls=[Call.model_validate(fits), Call.model_validate(too_long)])
        with pytest.raises(ContextLengthError) as e:
            await service.grow(run, growth)
        assert e.value.param == "calls[1].request"
        assert run.state.model_dump(exclude={"duration_ms"}) == before
        assert engine.requests == []

    async def test_a_program_without_growth_refuses_it(self, make):
        service = make(ScriptedEngine(held=True))
        run = await submit(service, program(("a", "Hi"), targets=["a.out"]))
        with pytest.raises(InvalidProgramError, match="closed and cannot grow"):
            await service.grow(run, ProgramGrowth(variables={"x": Variable(value="y")}))

    async def test_a_program_that_waits_too_long_for_its_client_is_given_up(self, make):
        run = await finished(make(idle_s=0.0), program(("a", "Hi"), open=True))
        assert isinstance(run.program.error, DeadlineExceededError)
        assert "waited 0 s for its client" in run.program.error.message

    async def test_a_program_at_work_is_not_idle(self, make):
        run = await finished(make(idle_s=0.0), chain())
        assert run.program.status == "completed"


class TestFailures:
    async def test_a_call_that_turns_out_too_long_fails_alone(self, make):
        engine = ScriptedEngine({"Draft": "word " * 60})
        service = make(engine)
        calls = [("draft", "Draft it."), ("long", *["$draft.out"] * 8), ("short", "Polish: ", "$draft.out")]
        request = program(
            targets=["long.out", "short.out"],
            calls=[call(*calls[0], max_tokens=70), call(*calls[1]), call(*calls[2])],
        )
        run = await finished(service, request)
        errors = {c.id: c.error.code for c in run.state.calls if c.error}
        assert errors == {"long": "context_length_exceeded"}
        assert run.state.status == "failed"
        assert "short.out" in run.state.variables

    async def test_an_engine_error_fails_the_call_and_what_needs_it(self, make):
        engine = ScriptedEngine(held=True)
        run = await submit(make(engine), chain())
        await until(lambda: engine.active)
        engine.fail("engine_failed", "the engine died 2 times while it worked on this call")
        assert {c.id: c.error.code for c in run.state.calls} == {
            "draft": "engine_failed",
            "polish": "upstream_failed",
        }
        assert run.program.ended

    async def test_an_engine_error_stops_the_other_choices(self, make):
        engine = ScriptedEngine(held=True)
        run = await submit(make(engine), program(calls=[call("a", "Hi", n=3)], targets=["a.out"]))
        await until(lambda: len(engine.active) == 3)
        engine.fail("engine_failed", "gone", engine.active[:1])
        assert len(engine.aborted) == 2
        assert run.program.status == "failed"

    async def test_a_bug_in_the_server_fails_one_call(self, make, caplog):
        engine = ScriptedEngine(held=True)
        service = make(engine)
        broken, fine = await submit(service, chain()), await submit(service, chain())
        await until(lambda: len(engine.active) == 2)
        engine.say(engine.active[0], ["not a token"])
        engine.step()
        assert broken.state.calls[0].error.code == "internal_error"
        assert "Traceback" in caplog.text
        engine.release()
        await fine.wait()
        assert fine.program.status == "completed"


class TestEnd:
    async def test_cancelling_stops_the_engine_at_once(self, make):
        engine = ScriptedEngine(held=True)
        service = make(engine)
        run = await submit(service, program(("a", "A"), ("b", "B"), targets=["a.out", "b.out"]))
        await until(lambda: len(engine.active) == 2)
        active = engine.active
        run.cancel(CancelledError("enough"))
        assert engine.active == []
        assert engine.aborts == [(active, False)], "one message for the whole program"
        assert service.num_live_calls == 0
        assert {c.error.code for c in run.state.calls} == {"cancelled"}
        run.cancel(CancelledError("again"))
        assert run.state.error.message == "enough"

    async def test_cancelling_while_a_prompt_is_rendered_submits_nothing(self, make):
        engine = ScriptedEngine({"Draft": "a draft"}, held=True)
        run = await submit(make(engine), chain())
        await until(lambda: engine.active)
        while "draft.out" not in run.values:
            engine.step()
        run.cancel(CancelledError("enough"))
        await asyncio.gather(*run._tasks)
        assert len(engine.requests) == 1

    async def test_the_last_client_to_leave_cancels(self, make):
        engine = ScriptedEngine(held=True)
        run = await submit(make(engine), chain())
        with run.attached():
            with run.attached():
                pass
            assert not run.program.ended
        assert run.state.error.code == "cancelled"

    async def test_a_detached_program_outlives_its_client(self, make):
        run = await submit(make(), chain(detached=True))
        with run.attached():
            pass
        await run.wait()
        assert run.program.status == "completed"

    async def test_a_deadline_cancels(self, make):
        engine = ScriptedEngine(held=True)
        request = program(("a", "A"), targets=[])
        request.targets.append(Target(variable="a.out", deadline_ms=1.0))
        run = await finished(make(engine), request)
        assert isinstance(run.program.error, DeadlineExceededError)
        assert "The deadline of 1 ms has passed. Calls still running: a." in run.program.error.message
        assert engine.active == []


class TestEvents:
    async def test_every_follower_sees_every_event_from_where_it_asks(self, make):
        engine = ScriptedEngine(CHAIN, held=True)
        run = await submit(make(engine), chain())

        async def follow(after):
            return [event async for event in run.events(after)]

        early = [asyncio.create_task(follow(after)) for after in (-1, 0)]
        await until(lambda: engine.active)
        for _ in range(2):
            engine.step()
        late = asyncio.create_task(follow(1))
        engine.release()
        from_start, from_first, from_second = await asyncio.gather(*early, late)
        assert from_start == run.program.events
        assert from_first == run.program.events[1:]
        assert from_second == run.program.events[2:]
        assert [event async for event in run.events(len(run.program.events) - 1)] == []

    async def test_a_follower_that_is_cancelled_disturbs_nobody(self, make):
        engine = ScriptedEngine(CHAIN, held=True)
        run = await submit(make(engine), chain())
        leaver, stayer = asyncio.create_task(run.wait()), asyncio.create_task(run.wait())
        await until(lambda: engine.active)
        leaver.cancel()
        engine.release()
        await stayer
        assert run.program.status == "completed"


async def test_prompt_tokens_are_counted_once(make):
    run = await finished(make(), program(calls=[call("a", "Hi", n=2)], targets=["a.out"]))
    prompt = len(encode(chat_prompt("Hi")))
    assert run.state.totals.model_dump() == {
        "calls": 1,
        "prompt_tokens": prompt,
        "cached_tokens": prompt // 2,
        "computed_tokens": prompt - prompt // 2,
        "completion_tokens": 40,
    }
