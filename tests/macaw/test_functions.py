"""Functions and sessions against a scripted server: what is sent and when, what comes back, what fails and how."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import macaw
from macaw import (
    CancelledError,
    ConnectionFailedError,
    ContextLengthError,
    InvalidProgramError,
    NativeFunctionError,
    OverloadedError,
    UnknownModelError,
    UpstreamFailedError,
)
from macaw.functions import driver
from macaw.protocol import (
    CallDelta,
    CallFailed,
    CallTimings,
    ErrorBody,
    ProgramCompleted,
    ProgramCreated,
    ProgramFailed,
    ProgramRequest,
    Totals,
    VariableResolved,
)

POST = ("POST", "/v1/programs")


@macaw.function(temperature=0, outputs={"test": {"max_tokens": 9}})
def write(task, language="Python"):
    """Write {{input:task}} in {{input:language}}. {{output:code}} Test it. {{output:test}}"""


@macaw.function
def review(code):
    """Review {{input:code}} {{output:remarks}}"""


@macaw.native_function
def shout(text):
    return text.upper()


def numbered(*events):
    for sequence, event in enumerate(events):
        event.sequence = sequence
    return list(events)


def resolved(**values):
    return [VariableResolved(variable=name.replace("__", "."), value=value) for name, value in values.items()]


def completed(*events):
    end = ProgramCompleted(program_id="p1", variables={}, critical_path=[], totals=Totals(), duration_ms=1.0)
    return numbered(ProgramCreated(program_id="p1"), *events, end)


def failed(name, message="boom", code="context_length_exceeded"):
    error = ErrorBody(message=message, type="invalid_request_error", code=code)
    return CallFailed(call_id=name, error=error, timings=CallTimings())


def refusal(error):
    return {"error": error.to_wire()}


@pytest.fixture
def session(server):
    with macaw.session(server.url) as session:
        yield session


@pytest.fixture(autouse=True)
def quick_end(monkeypatch):
    monkeypatch.setattr(driver, "END_TIMEOUT_S", 0.0)  # a scripted stream may not end


def sent(server, index=0):
    return ProgramRequest.model_validate(server.seen[index].body)


# ------------------------------------------------------------------------------------------------------------------
# What is sent


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
    server.answer("POST", "/v1/programs/p1/calls", {})  # not a state: the driver fails nothing but what it sent
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


# ------------------------------------------------------------------------------------------------------------------
# What comes back


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


# ------------------------------------------------------------------------------------------------------------------
# Client steps


def test_native_function_runs_between_calls(server, session):
    held = numbered(ProgramCreated(program_id="p1"), *resolved(review__remarks="r"))
    server.answer_events(*POST, held, then="hold")
    server.answer("PUT", "/v1/programs/p1/variables/shout.result", {})
    server.answer("DELETE", "/v1/programs/p1", {})
    loud = shout(review("x"))
    review(loud)
    assert loud.get() == "R"
    assert server.seen[0].body["variables"] == {"shout.result": {"external": True}}
    while len(server.seen) < 2:
        session._submit(asyncio.sleep(0)).result()
    assert server.seen[1].body == {"value": "R"}


def test_native_functions_alone_need_no_server(server, session):
    @macaw.native_function(outputs=["low", "high"])
    async def bounds(*values, factor=1):
        return min(values) * factor, max(values)

    @macaw.native_function
    def in_thread(values, more):
        assert threading.current_thread().name.startswith("macaw-step")
        return f"{values} {more['key']}"

    answer = bounds(3, 4, factor=2)
    assert (answer.low.get(), answer.high.get()) == ("6", "4")
    assert in_thread([answer.low, "x"], {"key": macaw.join([answer.high, "!"], "")}).get() == "['6', 'x'] 4!"
    assert server.seen == []


def test_native_function_runs_once_and_in_the_callers_context(session):
    runs = []

    @macaw.native_function
    def note(text):
        runs.append(text)
        return str(macaw.current_session() is session)

    noted = note("x")
    assert [noted.get(), noted.get(), shout(noted).get()] == ["True", "True", "TRUE"]
    assert runs == ["x"]


def test_variable_is_set_later(session):
    topic = macaw.variable("topic")
    loud = shout(topic)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(loud.get)
        topic.set("x")
        assert waiting.result() == "X"
    with pytest.raises(ValueError, match="variable 'topic' already has its value"):
        topic.set("y")
    with pytest.raises(ValueError, match=r"shout\(\): output 'result' gets its value from shout\(\)"):
        loud.set("y")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (["a"], r"TypeError: returned a list; a semantic variable is text\..*json\.dumps"),
        (None, "TypeError: returned a NoneType"),
    ],
)
def test_native_error_names_the_function_and_reaches_what_needs_it(server, session, result, message):
    @macaw.native_function
    def broken(text):
        if isinstance(result, Exception):
            raise result
        return result

    value = broken("x")
    loud = shout(value)
    with pytest.raises(NativeFunctionError, match=rf"broken\(\): output 'result' failed\. {message}") as caught:
        value.get()
    assert isinstance(caught.value.__cause__, ZeroDivisionError | TypeError)
    with pytest.raises(
        UpstreamFailedError, match=rf"shout\(\): output 'result' failed for want.*broken\(\).*{message}"
    ):
        loud.get()
    with pytest.raises(UpstreamFailedError, match=r"review\(\): output 'remarks'.*broken\(\)"):
        review(loud).get()


def test_as_many_values_as_outputs(session):
    @macaw.native_function(outputs=["a", "b"])
    def one():
        return "only"

    with pytest.raises(NativeFunctionError, match="returned 'only', not one text for each of: a, b"):
        one().a.get()


# ------------------------------------------------------------------------------------------------------------------
# Errors


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


# ------------------------------------------------------------------------------------------------------------------
# Wrong use


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: write(), r"write\(task, language='Python'\): missing a required argument: 'task'"),
        (lambda: write("a", "b", "c"), r"write\(task, language='Python'\): too many positional arguments"),
        (lambda: write("a", speech="b"), r"write.*unexpected keyword argument 'speech'"),
        (lambda: write(["a"]), r"write\(\): argument 'task' got a list.*json.dumps.*macaw.join"),
        (lambda: write("a", language=None), r"write\(\): argument 'language' got None"),
        (lambda: shout(), r"shout\(text\): missing a required argument: 'text'"),
        (lambda: macaw.join(["a", 3]), r"join\(\) got 3; texts and semantic variables"),
        (lambda: macaw.function(3), "@macaw.function goes on a Python function, not on 3"),
    ],
)
def test_type_errors_point_at_function_and_argument(session, make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: write("\ud800"), r"write\(\): argument 'task' holds half a surrogate pair"),
        (lambda: review("x").get("speed"), "objective 'speed' is not one of"),
        (lambda: review("x").get(deadline_ms=0), "deadline_ms 0 is not over 0"),
        (lambda: macaw.variable("a snake game"), r"variable name 'a snake game' is not one word.*value="),
        (lambda: macaw.native_function(outputs="ab")(len), "outputs 'ab' are not a list of different names"),
        (
            lambda: macaw.function(outputs={"cod": {}})(write.__wrapped__),
            r"write\(\) has no output 'cod'; it has: code",
        ),
        (
            lambda: macaw.function(max_token=3)(write.__wrapped__),
            r"write\(\): sampling of output 'code': max_token: Extra",
        ),
        (lambda: macaw.function(lambda x: x), r"<lambda>\(\) has no docstring, which is its prompt"),
    ],
)
def test_wrong_values_are_refused_at_once(session, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_prompt_names_the_function():
    with pytest.raises(ValueError, match=r"Prompt of broken\(\): \{\{input:tsak\}\} is no parameter"):

        @macaw.function
        def broken(task):
            """{{input:tsak}} {{output:code}}"""


def test_variadic_parameters_have_no_place():
    with pytest.raises(ValueError, match=r"many\(\) has a parameter \*texts"):

        @macaw.function
        def many(*texts):
            """{{input:texts}} {{output:code}}"""


def test_marked_parameters_are_outputs_in_their_order(session):
    @macaw.function
    def plan(second: macaw.Output(max_tokens=3), task: macaw.Input, first: "macaw.Output"):
        """{{task}} {{first}} more {{second}}"""

    assert plan.outputs == ["second", "first"]
    assert repr(plan) == "<macaw.function plan(task: macaw.functions.function.Input) -> second, first>"
    assert [variable.name for variable in plan("x")] == ["second", "first"]


def test_future_of_another_session_is_refused_until_it_has_its_value(server):
    with macaw.session(server.url):
        foreign = macaw.variable("foreign")
        with macaw.session(server.url) as inner:
            assert macaw.current_session() is inner
            for make in (review, shout):
                with pytest.raises(TypeError, match=r"argument .* is variable 'foreign' of another session"):
                    make(foreign)
            foreign.set("x")
            assert shout(foreign).get() == "X"


def test_every_thread_has_the_default_session_or_its_own(server, monkeypatch):
    monkeypatch.setenv("MACAW_BASE_URL", server.url)
    with macaw.session(server.url) as mine, ThreadPoolExecutor() as pool:
        theirs = pool.submit(macaw.current_session).result()
        assert macaw.current_session() is mine
    assert theirs is not mine
    assert theirs is macaw.current_session()
    theirs.close()
    following = macaw.current_session()
    assert following is not theirs
    following.close()


def test_session_ends_once():
    session = macaw.session("http://127.0.0.1:9")
    with session:
        topic = macaw.variable("topic")
        with pytest.raises(RuntimeError, match="entered once"):
            session.__enter__()
    with pytest.raises(RuntimeError, match="entered once"):
        session.__enter__()
    with pytest.raises(CancelledError, match="variable 'topic' has no value, and its session has ended"):
        topic.get()
    session.close()


def test_bad_url_is_refused_at_once():
    with pytest.raises(ValueError, match="'localhost:8000' has no scheme"):
        macaw.session("localhost:8000")


@pytest.mark.parametrize("by_exception", [False, True])
def test_leaving_cancels_what_runs(server, by_exception):
    held = numbered(ProgramCreated(program_id="p1"), *resolved(review__remarks="r"))
    server.answer_events(*POST, held, then="hold")
    server.answer("DELETE", "/v1/programs/p1", {})

    def use():
        with macaw.session(server.url):
            asked, unasked = review("a"), review("b")
            asked.get()
            left.append(unasked)
            if by_exception:
                raise KeyError("mine")

    left = []
    if by_exception:
        with pytest.raises(KeyError, match="mine"):
            use()
    else:
        use()
    assert [seen.method for seen in server.seen] == ["POST", "DELETE"]
    with pytest.raises(CancelledError, match=r"review\(\): output 'remarks'"):
        left[0].get()


def test_leaving_closes_a_program_that_is_done_and_an_exception_cancels_it(server):
    for error in (None, KeyError("mine")):
        server.reset()
        held = numbered(ProgramCreated(program_id="p1"), *resolved(review__remarks="r"))
        server.answer_events(*POST, held, then="hold")
        server.answer("DELETE", "/v1/programs/p1", {})
        server.answer("POST", "/v1/programs/p1/calls", {})
        try:
            with macaw.session(server.url):
                review("a").get()
                if error:
                    raise error
        except KeyError:
            pass
        assert server.seen[-1].method == ("DELETE" if error else "POST")


def test_idle_program_is_closed(server, monkeypatch):
    monkeypatch.setattr(driver, "LINGER_S", 0.0)
    held = numbered(ProgramCreated(program_id="p1"), *resolved(review__remarks="r"))
    server.answer_events(*POST, held, then="hold")
    server.answer("POST", "/v1/programs/p1/calls", {})
    with macaw.session(server.url) as session:
        review("a").get()
        while len(server.seen) < 2:
            session._submit(asyncio.sleep(0)).result()
    assert server.seen[1].body["close"] is True
