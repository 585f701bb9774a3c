"""Client steps: native functions and variables that are set later, between calls and without a server."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import macaw
from functions_on_script import POST, numbered, resolved, review, shout
from macaw import NativeFunctionError, UpstreamFailedError
from macaw.protocol import ProgramCreated

pytestmark = pytest.mark.usefixtures("quick_end")


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
