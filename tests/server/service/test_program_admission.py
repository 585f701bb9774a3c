"""Which programs a service takes, and how long it keeps them: refusals, idempotency, limits, draining."""

import asyncio

import pytest

from macaw.errors import (
    ContextLengthError,
    EngineFailedError,
    InvalidProgramError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnknownModelError,
)
from macaw.protocol import Call, Hints, ProgramGrowth
from macaw_server.service.tenants import ANONYMOUS
from server.service.harness import (
    CHAIN,
    MAX_MODEL_LEN,
    MODEL,
    OTHER,
    ScriptedEngine,
    call,
    chain,
    finished,
    program,
    submit,
    until,
)


class TestRefusals:
    """What can be known to be wrong is refused before anything starts."""

    @pytest.mark.parametrize(
        ("request_", "error", "param", "text"),
        [
            (
                program(("a", "x", "$b"), targets=["a.out"]),
                InvalidProgramError,
                None,
                "'b' is not in the program",
            ),
            (
                program(("a", "Hi"), targets=["a.out"], model="gpt-9"),
                UnknownModelError,
                "model",
                f"'{MODEL}'",
            ),
            (
                program(("a", "word " * MAX_MODEL_LEN), targets=["a.out"]),
                ContextLengthError,
                "calls[0].request",
                f"context of {MAX_MODEL_LEN}",
            ),
            (
                program(("a", "word " * 300, "$v"), targets=["a.out"], variables={"v": {"value": "word " * 300}}),
                ContextLengthError,
                "calls[0].request",
                "Shorten the prompt",
            ),
        ],
    )
    async def test_sound_errors_and_nothing_starts(self, make, request_, error, param, text):
        engine = ScriptedEngine()
        service = make(engine)
        with pytest.raises(error, match=text) as e:
            await submit(service, request_)
        assert param is None or e.value.param == param
        assert engine.requests == []
        assert service.list(ANONYMOUS) == []

    @pytest.mark.parametrize(
        ("fields", "param", "text"),
        [
            ({"logit_bias": {"400": 1.0}}, "logit_bias", "token id 400; the model's ids are 0 to 399"),
            ({"stop_token_ids": [5, 4000]}, "stop_token_ids", "token id 4000"),
            ({"min_tokens": 21}, "min_tokens", "min_tokens 21 is over max_tokens 20"),
            ({"max_completion_tokens": 3}, "max_tokens", "Both max_tokens"),
            ({"model": "gpt-9"}, "model", "'gpt-9' is not served. Served: 'tiny/scripted'"),
        ],
    )
    async def test_calls_are_checked_even_where_the_prompt_is_not_known(self, make, fields, param, text):
        request = program(targets=["b.out"], calls=[call("a", "Hi"), call("b", "$a.out", **fields)])
        with pytest.raises((InvalidProgramError, UnknownModelError), match=text) as e:
            await submit(make(), request)
        assert e.value.param == f"calls[1].request.{param}"

    async def test_an_engine_that_is_gone_takes_no_programs(self, make):
        engine = ScriptedEngine()
        engine.status = "failed"
        with pytest.raises(EngineFailedError, match="Restart the server"):
            await submit(make(engine), chain())


class TestIdempotency:
    async def test_the_same_body_joins(self, make):
        engine = ScriptedEngine(CHAIN)
        service = make(engine)
        first, second = await asyncio.gather(
            submit(service, chain(idempotency_key="k")), submit(service, chain(idempotency_key="k"))
        )
        await first.wait()
        assert await submit(service, chain(idempotency_key="k")) is first is second
        assert len(engine.requests) == 2

    async def test_another_body_is_refused(self, make):
        service = make()
        await submit(service, chain(idempotency_key="k"))
        with pytest.raises(InvalidRequestError, match="was used for another body") as e:
            await submit(service, chain(idempotency_key="k", detached=True))
        assert e.value.param == "idempotency_key"

    async def test_a_key_belongs_to_its_tenant(self, make):
        service = make()
        mine = await submit(service, chain(idempotency_key="k"))
        theirs = await submit(service, chain(idempotency_key="k"), tenant=OTHER)
        assert mine.id != theirs.id

    async def test_a_cancelled_program_does_not_hold_its_key(self, make):
        engine = ScriptedEngine(CHAIN, held=True)
        service = make(engine)
        first = await submit(service, chain(idempotency_key="k"))
        with first.attached():
            pass  # the client's connection breaks
        assert first.program.status == "failed"
        second = await submit(service, chain(idempotency_key="k"))
        assert second.id != first.id
        assert second.program.status == "running"

    async def test_a_refused_program_does_not_hold_its_key(self, make):
        service = make()
        wrong = program(("a", "x", "$b"), targets=["a.out"], idempotency_key="k")
        results = await asyncio.gather(submit(service, wrong), submit(service, wrong), return_exceptions=True)
        assert [type(r) for r in results] == [InvalidProgramError] * 2
        await finished(service, chain(idempotency_key="k"))


class TestLimits:
    async def test_too_many_live_calls_are_refused_until_some_end(self, make):
        engine = ScriptedEngine(CHAIN, held=True)
        service = make(engine, max_live_calls=3)
        run = await submit(service, chain())
        with pytest.raises(OverloadedError, match="2 calls are waiting or running") as e:
            await submit(service, chain())
        assert e.value.status == 429
        assert e.value.retry_after_s == 60.0
        engine.release()
        await run.wait()
        await submit(service, chain())
        with pytest.raises(OverloadedError) as e:
            await submit(service, chain())
        assert e.value.retry_after_s == 1.0

    async def test_every_choice_counts_as_a_call(self, make):
        engine = ScriptedEngine(held=True)
        service = make(engine, max_live_calls=4)
        run = await submit(service, program(calls=[call("a", "Hi", n=3)], targets=["a.out"]))
        assert service.num_live_calls == 3
        with pytest.raises(OverloadedError):
            await submit(service, chain())
        engine.release()
        await run.wait()
        assert service.num_live_calls == 0

    async def test_growths_that_arrive_together_share_the_room(self, make):
        service = make(ScriptedEngine(held=True), max_live_calls=3)
        run = await submit(service, program(open=True))
        growths = [ProgramGrowth(calls=[Call(**call(f"c{i}", "text"))]) for i in range(5)]
        results = await asyncio.gather(*(service.grow(run, growth) for growth in growths), return_exceptions=True)
        assert [type(result) for result in results].count(OverloadedError) == 2
        assert service.num_live_calls == 3

    async def test_a_program_that_can_never_fit_is_told_so(self, make):
        with pytest.raises(InvalidProgramError, match="2 calls at once are over this server's limit of 1"):
            await submit(make(max_live_calls=1), chain())

    async def test_finished_programs_are_kept_up_to_a_number(self, make):
        service = make(max_kept_programs=2)
        runs = [await finished(service, chain(idempotency_key=str(i))) for i in range(4)]
        assert service.list(ANONYMOUS) == runs[2:]
        with pytest.raises(NotFoundError):
            service.get(ANONYMOUS, runs[1].id)
        assert (await submit(service, chain(idempotency_key="0"))).id != runs[0].id

    async def test_finished_programs_are_kept_up_to_a_number_of_events(self, make):
        service = make(max_kept_events=1)
        runs = [await finished(service, chain()) for _ in range(2)]
        assert service.list(ANONYMOUS) == runs[1:]

    async def test_finished_programs_are_kept_for_a_time(self, make):
        service = make(kept_s=0.0)
        run = await finished(service, chain())
        assert service.list(ANONYMOUS) == []
        assert run.program.status == "completed"

    async def test_programs_of_other_tenants_are_not_found(self, make):
        service = make(ScriptedEngine(held=True))
        run = await submit(service, chain())
        with pytest.raises(NotFoundError):
            service.get(OTHER, run.id)
        assert service.get(ANONYMOUS, run.id) is run
        assert service.list(OTHER) == []

    async def test_plain_programs_are_not_kept(self, make):
        service = make()
        run = await finished(service, program(("0", "Hi"), targets=["0.out"]), hints=Hints())
        with pytest.raises(NotFoundError):
            service.get(ANONYMOUS, run.id)


class TestDrain:
    async def test_running_programs_end_and_new_ones_are_refused(self, make):
        engine = ScriptedEngine(CHAIN, held=True)
        service = make(engine)
        run = await submit(service, chain())
        draining = asyncio.create_task(service.drain(60))
        await until(lambda: service.draining)
        with pytest.raises(OverloadedError, match="shutting down") as e:
            await submit(service, chain())
        assert e.value.status == 503
        engine.release()
        await draining
        assert run.program.status == "completed"

    async def test_what_does_not_end_in_time_is_cancelled(self, make):
        engine = ScriptedEngine(held=True)
        service = make(engine)
        run = await submit(service, chain())
        await until(lambda: engine.active)
        await service.drain(0)
        assert run.state.error.code == "cancelled"
        assert engine.active == []
