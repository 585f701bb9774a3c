"""Sessions: which is the current one, how they end, and what becomes of their programs."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

import macaw
from functions_on_script import POST, numbered, resolved, review, shout
from macaw import CancelledError
from macaw.functions import driver
from macaw.protocol import ProgramCreated

pytestmark = pytest.mark.usefixtures("quick_end")


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
