"""What the service says of calls to come, and that it lets go: at the end of a program, however that comes."""

from __future__ import annotations

import pytest

from macaw.errors import CancelledError
from macaw.protocol import Hints, ProgramGrowth
from macaw_server.engine.types import Reuse
from macaw_server.programs.program import STEPS_TO_UNKNOWN
from server.service.harness import ScriptedEngine, call, program, submit, until

RULES = "These are the rules that all calls of this program begin with, so that they are worth keeping. " * 3


def chain(**fields):
    return program(("a", RULES), ("b", RULES, "$a.out"), targets=["b.out"], **fields)


async def test_a_call_says_what_calls_to_come_have_in_common_with_it(make):
    engine = ScriptedEngine()
    run = await submit(make(engine), chain())
    await run.wait()
    a, b = engine.requests
    assert [(reuse.steps, a.hints.may_return) for reuse in a.hints.reuse] == [(1, False)]
    num_common = next(i for i, (x, y) in enumerate(zip(a.prompt_ids, b.prompt_ids, strict=False)) if x != y)
    assert a.hints.reuse[0].num_tokens == pytest.approx(num_common, rel=0.1)
    assert b.hints.reuse == ()
    assert engine.let_gos == [run.id]


async def test_a_program_of_one_call_keeps_nothing(make):
    engine = ScriptedEngine()
    run = await submit(make(engine), program(("a", RULES), targets=["a.out"]))
    await run.wait()
    assert (engine.requests[0].hints.reuse, engine.requests[0].hints.may_return) == ((), False)
    assert engine.let_gos == []


async def test_a_plain_request_may_be_gone_on_from(make):
    engine = ScriptedEngine()
    service = make(engine)
    run = await submit(service, program(("a", RULES), targets=["a.out"]), hints=Hints())
    await run.wait()
    assert (engine.requests[0].hints.reuse, engine.requests[0].hints.may_return) == ((), True)


@pytest.mark.parametrize("how", ["cancel", "fail", "close"])
async def test_it_lets_go_however_a_program_ends(make, how):
    engine = ScriptedEngine(held=True)
    run = await submit(make(engine), program(("a", RULES), targets=["a.out"], open=True))
    await until(lambda: engine.requests)
    assert engine.requests[0].hints.reuse == (Reuse(None, STEPS_TO_UNKNOWN),)
    if how == "cancel":
        run.cancel(CancelledError("Enough."))
        assert engine.aborted, "first its calls end"
    elif how == "fail":
        engine.fail("engine_failed", "It broke.")
        assert engine.let_gos == [], "it may grow"
        run.grow(ProgramGrowth(close=True), {})
    else:
        engine.release()
        await until(lambda: run.program.calls["a"].status == "completed")
        run.grow(ProgramGrowth(close=True), {})
    await run.wait()
    assert engine.let_gos == [run.id]


async def test_what_was_prefilled_ahead_is_let_go_with_its_call(make):
    engine = ScriptedEngine(held=True)
    run = await submit(make(engine, prefill_ahead=True), chain())
    await until(lambda: any(request.prefill_only for request in engine.requests))
    ahead = next(request.request_id for request in engine.requests if request.prefill_only)
    engine.release()
    await run.wait()
    assert engine.let_gos.count(ahead) + engine.aborted.count(ahead) == 1
    assert engine.let_gos[-1] == run.id


async def test_growth_brings_calls_to_come(make):
    engine = ScriptedEngine(held=True)
    service = make(engine)
    run = await submit(service, program(("a", RULES), open=True))
    await until(lambda: engine.requests)
    await service.grow(run, ProgramGrowth.model_validate({"calls": [call("b", RULES), call("c", RULES, "$b.out")]}))
    await until(lambda: len(engine.requests) == 2)
    assert [reuse.steps for reuse in engine.requests[1].hints.reuse] == [1, STEPS_TO_UNKNOWN]
    run.cancel(CancelledError("Enough."))
