"""Macaw's own client against a real socket: what both ends agree on."""

import pytest

from macaw import MacawClient
from macaw.errors import CancelledError, InvalidProgramError, UnknownModelError
from macaw.protocol import (
    Call,
    CallCompleted,
    ProgramCompleted,
    ProgramGrowth,
    ProgramRequest,
    Target,
    Variable,
)
from server.service.harness import MODEL, call, program, until


@pytest.fixture
def client(live):
    with MacawClient(live.url) as client:
        yield client


def counting(**fields) -> ProgramRequest:
    return program(("count", "Count."), targets=["count.out"], **fields)


def test_run(client):
    state = client.run_program(counting())
    assert state.result() == {"count.out": "one two three four"}
    assert client.get_program(state.id) == state
    assert client.list_programs() == [state]


def test_stream(client):
    with client.stream_program(counting()) as stream:
        events = list(stream)
    (completed,) = (event for event in events if isinstance(event, CallCompleted))
    assert completed.completion["usage"]["total_tokens"] > 0
    assert completed.timings.ready_ms <= completed.timings.started_ms <= completed.timings.completed_ms
    assert isinstance(events[-1], ProgramCompleted)
    assert list(client.events(stream.program_id)) == events


def test_grow_and_set_a_variable(client, live):
    with client.stream_program(program(open=True)) as stream:
        growth = ProgramGrowth(
            variables={"what": Variable(external=True)},
            calls=[Call.model_validate(call("again", "$what"))],
            targets=[Target(variable="again.out")],
            close=True,
        )
        client.grow(stream.program_id, growth)
        client.set_variable(stream.program_id, "what", "Count again.")
        assert stream.result() == {"again.out": "one two three four"}


def test_cancel(client, live):
    live.engine.hold()
    with client.stream_program(counting()) as stream:
        client.cancel(stream.program_id)
        with pytest.raises(CancelledError, match="cancelled by DELETE"):
            stream.result()


def test_leaving_the_stream_cancels(client, live):
    live.engine.hold()
    with client.stream_program(counting()):
        live.run(until(lambda: live.engine.active))
    live.run(until(lambda: not live.engine.active))
    (state,) = client.list_programs()
    assert state.error.code == "cancelled"


def test_errors(client):
    with pytest.raises(UnknownModelError, match=MODEL):
        client.run_program(counting(model="gpt-9"))
    with pytest.raises(InvalidProgramError, match='Set "stream": true'):
        client.run_program(counting(open=True))


def test_models_and_health(client):
    assert client.models() == [MODEL]
    assert client.health()["status"] == "ok"
