"""Functions and sessions against a scripted server: what is sent and when, and what comes back."""

import asyncio

import pytest

import macaw
from functions_on_script import POST, completed, failed, numbered, resolved, review, sent, write
from macaw import CancelledError, ContextLengthError
from macaw.protocol import CallDelta, ProgramCreated, ProgramRequest

pytestmark = pytest.mark.usefixtures("quick_end")


def test_nothing_is_sent_until_something_is_asked_for(server):
    with macaw.session(server.url):
        code, test = write("a game")
        remarks = review(code)
        assert not any(variable.ready for variable in (code, test, remarks))
    assert server.seen == []
    with pytest.raises(CancelledError, match=r"review\(\): output 'remarks' was not finished when its session ended"):
        remarks.get()


def test_everything_built_so_far_is_one_program(server, session):
    values = {"write__code": "c", "write__test": "t", "review__remarks": "r"}
    server.answer_events(*POST, completed(*resolved(**values)))
    outputs = write("a game")
    remarks = review(outputs.code)
    assert remarks.get() == "r"
    assert [value.get() for value in outputs] == ["c", "t"]
    [request] = server.seen
    program = ProgramRequest.model_validate(request.body)
    assert (program.open, program.stream) == (True, True)
    assert [(call.id, call.output, call.inputs) for call in program.calls] == [
        ("write.code", "write.code", []),
        ("write.test", "write.test", ["write.code"]),
        ("review.remarks", "review.remarks", ["write.code"]),
    ]
    assert [message.role for message in program.calls[1].request.messages] == ["user", "assistant", "user"]
    assert "".join(part.text for part in program.calls[0].request.parts) == "Write a game in Python."
    assert [call.request.max_tokens for call in program.calls] == [None, 9, None]
    assert [call.request.temperature for call in program.calls] == [0, 0, None]
    assert {t.variable: t.objective for t in program.targets} == {
        "review.remarks": "latency",
        "write.test": "latency",
    }


def test_text_completion_and_model(server, session, monkeypatch):
    @macaw.function(chat=False, model="other", stop="\n")
    def complete(start):
        """{{input:start}} and{{output:rest}}"""

    server.answer_events(*POST, completed(*resolved(complete__rest="more")))
    assert complete(start="Once").get() == "more"
    request = sent(server).calls[0].request
    assert [part.text for part in request.prompt] == ["Once", " and"]
    assert (request.model, request.stop) == ("other", "\n")


def test_objective_and_deadline(server, session):
    server.answer_events(*POST, completed(*resolved(review__remarks="r", **{"review__remarks-2": "s"})))
    first, _ = review("a"), review("b")
    first.get("throughput", deadline_ms=5000)
    wanted, other = sent(server).targets
    assert (wanted.variable, wanted.objective) == ("review.remarks", "throughput")
    assert 1 <= wanted.deadline_ms <= 5000
    assert (other.variable, other.objective, other.deadline_ms) == ("review.remarks-2", "throughput", None)


def test_stricter_wish_is_told_and_a_looser_one_is_not(server, session):
    held = numbered(ProgramCreated(program_id="p1"), *resolved(review__remarks="r"))
    server.answer_events(*POST, held, then="hold")
    first, second, third = review("a"), review("b"), review("c")
    first.get("throughput")
    server.answer("POST", "/v1/programs/p1/calls", {})
    second._ask("throughput", None)
    third._ask("latency", None)
    session._submit(asyncio.sleep(0)).result()
    while len(server.seen) < 2:
        session._submit(asyncio.sleep(0)).result()
    assert server.seen[1].body["targets"] == [{"variable": "review.remarks-3", "objective": "latency"}]
    server.answer("DELETE", "/v1/programs/p1", {})


def test_variables_are_sent_once_and_join_is_text(server, session):
    server.answer_events(*POST, completed(*resolved(review__remarks="r", **{"review__remarks-2": "s"})))
    document = macaw.variable("document", value="long")
    first = review(document)
    review(macaw.join([document, "and", first], separator=" + ")).get()
    program = sent(server)
    assert {name: variable.value for name, variable in program.variables.items()} == {"document": "long"}
    assert program.calls[1].inputs == ["document", "review.remarks"]
    texts = [getattr(part, "text", None) for part in program.calls[1].request.parts]
    assert texts == ["Review ", None, " + ", "and", " + ", None]


def test_numbers_are_text(server, session):
    server.answer_events(*POST, completed(*resolved(review__remarks="r")))
    review(4.5).get()
    assert sent(server).calls[0].request.parts[1].text == "4.5"


def test_session_options_and_environment(server, monkeypatch):
    monkeypatch.setenv("MACAW_BASE_URL", server.url)
    monkeypatch.setenv("MACAW_API_KEY", "secret")
    monkeypatch.setenv("MACAW_MODEL", "from-env")
    server.answer_events(*POST, completed(*resolved(review__remarks="r")))
    with macaw.session(max_concurrency=2, metadata={"run": "7"}):
        assert review("x").get() == "r"
    program = sent(server)
    assert (program.model, program.max_concurrency, program.metadata) == ("from-env", 2, {"run": "7"})
    assert server.seen[0].headers["authorization"] == "Bearer secret"


def delta(name, text, index=0):
    return CallDelta(call_id=name, chunk={"choices": [{"index": index, "delta": {"content": text}}]})


def test_stream_gives_the_pieces(server, session):
    pieces = [delta("review.remarks", t) for t in ("", "a", "b")] + [delta("review.remarks", "other", index=1)]
    server.answer_events(*POST, completed(*pieces, *resolved(review__remarks="abc")))
    remarks = review("x")
    assert "".join(remarks.stream()) == "abc"
    assert list(remarks.stream()) == ["abc"]


def test_stream_raises_at_its_end(server, session):
    server.answer_events(*POST, completed(delta("review.remarks", "a"), failed("review.remarks")))
    seen = []
    with pytest.raises(ContextLengthError):
        seen.extend(review("x").stream())
    stream = review("y")
    assert stream.session is session


def test_await_gather_and_async_for(server):
    async def main():
        async with macaw.session(server.url):
            code, test = write("a game")
            assert await asyncio.gather(code, test) == ["c", "t"]
            assert [piece async for piece in code] == ["c"]
            assert await code.aget(objective="throughput") == "c"

    server.answer_events(*POST, completed(*resolved(write__code="c", write__test="t")))
    asyncio.run(main())
    assert len(server.seen) == 1


def test_await_works_in_a_plain_session_too(server, session):
    async def main():
        return await review("x")

    server.answer_events(*POST, completed(*resolved(review__remarks="r")))
    assert asyncio.run(main()) == "r"


def test_get_on_the_sessions_own_loop_is_refused(server):
    async def main():
        async with macaw.session(server.url):
            with pytest.raises(RuntimeError, match=r"review\(\): output 'remarks'.*would block.*await"):
                review("x").get()
            with pytest.raises(RuntimeError, match="would block"):
                next(review("x").stream())

    asyncio.run(main())
    assert server.seen == []


def test_giving_up_waiting_does_not_spoil_the_value(server):
    async def main():
        async with macaw.session(server.url):
            remarks = review(topic)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(remarks.aget(), timeout=0)
            assert not remarks.ready

    server.answer_events(*POST, numbered(ProgramCreated(program_id="p1")), then="hold")
    server.answer("DELETE", "/v1/programs/p1", {})
    topic = "x"
    asyncio.run(main())


def test_value_reads_like_text_once_it_is_there(server, session):
    server.answer_events(*POST, completed(*resolved(review__remarks="fine")))
    remarks = review("x")
    assert "waits" in repr(remarks)
    with pytest.raises(TypeError, match=r"value of review\(\): output 'remarks' is not known yet.*\.get\(\)"):
        f"{remarks}"
    remarks.get()
    assert f"{remarks:>6}" == "  fine"
    assert repr(remarks) == "<SemanticVariable 'remarks' of review(): 'fine'>"
