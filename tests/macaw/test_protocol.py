import pytest
from pydantic import TypeAdapter, ValidationError

from macaw import protocol
from macaw.errors import InvalidRequestError, OverloadedError
from macaw.protocol import (
    AnyEvent,
    Call,
    ChatCompletionRequest,
    ErrorBody,
    ProgramCreated,
    ProgramState,
    Target,
    Totals,
)

MESSAGES = [{"role": "user", "content": "Hi"}]
FLOATS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]


def test_exports_are_what_the_package_defines():
    assert all(hasattr(protocol, name) for name in protocol.__all__)
    assert len(protocol.__all__) == len(set(protocol.__all__))


@pytest.mark.parametrize("field", FLOATS)
def test_whole_numbers_are_numbers(field):
    assert getattr(ChatCompletionRequest.model_validate({"messages": MESSAGES, field: 1}), field) == 1.0


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", ["0.5", True, float("nan")])
def test_what_is_no_number_is_refused(field, value):
    with pytest.raises(ValidationError, match=field):
        ChatCompletionRequest.model_validate({"messages": MESSAGES, field: value})


def test_bias_that_is_no_number_is_refused():
    with pytest.raises(ValidationError, match="logit_bias"):
        ChatCompletionRequest.model_validate({"messages": MESSAGES, "logit_bias": {"1": "5"}})


def test_infinite_deadline_is_refused():
    with pytest.raises(ValidationError, match="finite"):
        Target(variable="x", deadline_ms=float("inf"))


def test_error_in_a_call_speaks_of_its_kind_of_request_only():
    call = {"id": "a", "output": "b", "request": {"messages": MESSAGES, "max_token": 1}}
    with pytest.raises(ValidationError) as caught:
        Call.model_validate(call)
    assert [error["loc"] for error in caught.value.errors()] == [("request", "max_token")]


def test_error_object_becomes_the_exception_it_stands_for():
    error = OverloadedError("The queue is full.", param="p")
    back = ErrorBody(**error.to_wire()).to_exception()
    assert (type(back), str(back), back.param) == (OverloadedError, "The queue is full.", "p")


def test_event_is_picked_by_its_type():
    event = TypeAdapter(AnyEvent).validate_json('{"type": "program.created", "sequence": 0, "program_id": "p"}')
    assert event == ProgramCreated(program_id="p")


def test_running_program_has_no_result():
    state = ProgramState(
        id="p1",
        status="running",
        model="m",
        calls=[],
        transforms=[],
        targets=[Target(variable="final")],
        variables={},
        critical_path=[],
        totals=Totals(),
        duration_ms=0.0,
        metadata={},
    )
    with pytest.raises(InvalidRequestError, match=r"p1 is still running.*client.events\('p1'\).result\(\)"):
        state.result()
