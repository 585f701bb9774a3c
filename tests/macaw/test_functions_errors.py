"""What fails, how much fails with it, and which function an error names."""

import asyncio

import pytest

import macaw
from functions_on_script import POST, completed, failed, numbered, refusal, resolved, review, sent, shout, write
from macaw import (
    ConnectionFailedError,
    ContextLengthError,
    InvalidProgramError,
    OverloadedError,
    UnknownModelError,
    UpstreamFailedError,
)
from macaw.protocol import ErrorBody, ProgramCreated, ProgramFailed, Totals

pytestmark = pytest.mark.usefixtures("quick_end")


def test_failed_call_names_function_output_and_root(server, session):
    message = "Context of 9,120 tokens is over the model's 8,192."
    server.answer_events(*POST, completed(failed("write.code", message)))
    code, test = write("x")
    loud = shout(test)
    with pytest.raises(ContextLengthError, match=rf"write\(\): output 'code' failed\. {message}") as caught:
        code.get()
    assert caught.value.code == "context_length_exceeded"
    for variable, name in ((test, r"write\(\): output 'test'"), (loud, r"shout\(\): output 'result'")):
        with pytest.raises(UpstreamFailedError, match=rf"{name}.*write\(\): output 'code' failed\. {message}"):
            variable.get()


def test_call_that_is_refused_fails_alone(server, session):
    error = ContextLengthError("Too long.", param="calls[1].request.messages[0]")
    server.answer(*POST, refusal(error), status=400)
    server.answer_events(*POST, completed(*resolved(review__remarks="r")))
    good, bad = review("short"), review("long")
    after = review(bad)
    assert good.get() == "r"
    with pytest.raises(ContextLengthError, match=r"review\(\): output 'remarks' failed\. Too long"):
        bad.get()
    with pytest.raises(UpstreamFailedError):
        after.get()
    assert [call.id for call in sent(server, 1).calls] == ["review.remarks"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnknownModelError("No model 'x'.", param="calls[0].request.model"), 404),
        (InvalidProgramError("Wrong.", param="metadata"), 400),
    ],
)
def test_error_of_the_whole_program_fails_all_of_it(server, session, error, status):
    server.answer(*POST, refusal(error), status=status)
    first, second = review("a"), review("b")
    for variable in (first, second):
        with pytest.raises(type(error), match=rf"review\(\): output 'remarks' failed\. {error.message}"):
            variable.get()
    assert len(server.seen) == 1


def test_call_with_a_model_of_its_own_fails_alone(server, session):
    @macaw.function(model="x")
    def other(text):
        """{{input:text}} {{output:answer}}"""

    server.answer(*POST, refusal(UnknownModelError("No 'x'.", param="calls[0].request.model")), status=404)
    server.answer_events(*POST, completed(*resolved(review__remarks="r")))
    wrong, right = other("a"), review("b")
    assert right.get() == "r"
    with pytest.raises(UnknownModelError, match=r"other\(\): output 'answer' failed\. No 'x'"):
        wrong.get()


def test_no_server(monkeypatch):
    with (
        macaw.session("http://127.0.0.1:9"),
        pytest.raises(ConnectionFailedError, match=r"review\(\).*No Macaw server"),
    ):
        review("x").get()


def test_broken_stream_fails_what_waits(server, session):
    held = numbered(ProgramCreated(program_id="p1"), *resolved(review__remarks="r"))
    server.answer_events(*POST, held, then="drop")
    first, second = review("a"), review("b")
    assert first.get() == "r"
    with pytest.raises(ConnectionFailedError, match=r"review\(\): output 'remarks' failed"):
        second.get()


def test_ended_program_is_followed_by_a_new_one_with_the_values(server, session):
    server.answer_events(*POST, completed(*resolved(review__remarks="r")))
    first = review("a")
    first.get()
    while not session._driver._live.pump.done():
        session._submit(asyncio.sleep(0)).result()
    server.answer_events(*POST, completed(*resolved(**{"review__remarks-2": "s"})))
    assert review(first).get() == "s"
    program = sent(server, 1)
    assert {name: variable.value for name, variable in program.variables.items()} == {"review.remarks": "r"}
    assert [(call.id, call.inputs) for call in program.calls] == [("review.remarks-2", ["review.remarks"])]


def test_growth_that_comes_too_late_goes_into_a_new_program(server, session):
    gone = ErrorBody(message="idle", type="call_error", code="deadline_exceeded")
    end = ProgramFailed(program_id="p1", error=gone, variables={}, totals=Totals(), duration_ms=1.0)
    held = numbered(ProgramCreated(program_id="p1"), *resolved(review__remarks="r"))
    server.answer_events(*POST, held, then="hold")
    assert review("a").get() == "r"
    server.answer("POST", "/v1/programs/p1/calls", refusal(InvalidProgramError("Program 'p1' has ended.")), status=400)
    server.answer("GET", "/v1/programs/p1", refusal(macaw.NotFoundError("No program 'p1'.")), status=404)
    server.answer_events(*POST, completed(*resolved(review__remarks="s")))
    assert review("b").get() == "s"
    assert end.error.to_exception().code == "deadline_exceeded"


def test_growth_waits_for_a_server_that_is_full(server):
    full = refusal(OverloadedError("Full."))
    with macaw.session(server.url):
        server.answer_events(
            *POST, numbered(ProgramCreated(program_id="p1"), *resolved(review__remarks="r")), then="hold"
        )
        assert review("a").get() == "r"
        for _ in range(3):
            server.answer("POST", "/v1/programs/p1/calls", full, status=429, retry_after="0")
        with pytest.raises(OverloadedError, match="Full"):
            review("b").get()
        assert len(server.seen) == 4
        server.answer("POST", "/v1/programs/p1/calls", {})


def test_refused_growth_leaves_the_program_as_it_is(server):
    held = numbered(ProgramCreated(program_id="p1"), *resolved(review__remarks="r"))
    with macaw.session(server.url):
        server.answer_events(*POST, held, then="hold")
        assert review("a").get() == "r"
        overloaded = refusal(OverloadedError("Full."))
        server.answer("POST", "/v1/programs/p1/calls", overloaded, status=429)
        with pytest.raises(OverloadedError, match=r"review\(\): output 'remarks' failed\. Full"):
            review("b").get()
        server.answer("POST", "/v1/programs/p1/calls", {})
    assert server.seen[-1].body["close"] is True
