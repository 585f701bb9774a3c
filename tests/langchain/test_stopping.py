"""A run that ends early takes its program with it: also one that has grown, and one that waits to grow."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from chain_corpus import TEXT, chat
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel
from test_client_steps import ask

from conftest import TENANTS
from langchain_macaw import ChatMacaw, compile
from langchain_macaw.plan import CURRENT_PLAN
from macaw import MacawClient
from macaw_server.serve import LocalServer
from scripted_macaw_server import Recorder

STEP = RunnableLambda(lambda text: text)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    assert CURRENT_PLAN.get() is None
    assert not {"macaw-program", "macaw-growth"} & {thread.name for thread in threading.enumerate()}


def held(llm: ChatMacaw) -> Runnable[Any, Any]:
    """One branch answers, after a growth; the other one hangs, and would grow."""
    hanging = ask(llm, "{x} HOLD") | STEP | ask(llm, "After {y}")
    return RunnableParallel(quick=ask(llm) | STEP | ask(llm, "Quick {y}"), hanging=hanging)


def failing(llm: ChatMacaw) -> Runnable[Any, Any]:
    fails = ask(llm, "Fail {x}") | STEP | ask(llm, "Then {y}") | RunnableLambda(lambda _: 1 / 0)
    return RunnableParallel(fails=fails, hanging=ask(llm, "{x} HOLD") | STEP | ask(llm, "After {y}"))


def test_closed_stream(llm: ChatMacaw, recorder: Recorder) -> None:
    stream = compile(held(llm)).stream({"x": "1"})
    assert "quick" in next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert recorder.cancelled == ["prog-1"]
    assert recorder.requests["chat"] == 0


async def test_closed_async_stream(llm: ChatMacaw, recorder: Recorder) -> None:
    stream = compile(held(llm)).astream({"x": "1"})
    assert "quick" in await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await asyncio.to_thread(recorder.cancellation.wait, 10)
    assert recorder.cancelled == ["prog-1"]
    assert recorder.requests["chat"] == 0


async def test_closed_events(llm: ChatMacaw, recorder: Recorder) -> None:
    async for event in compile(held(llm)).astream_events({"x": "1"}, version="v2"):
        if event["event"] == "on_parser_stream":
            break
    await asyncio.to_thread(recorder.cancellation.wait, 10)
    assert recorder.cancelled == ["prog-1"]


async def test_cancelled_task(llm: ChatMacaw, recorder: Recorder) -> None:
    quick = asyncio.Event()
    chain = RunnableParallel(quick=ask(llm, "Quick {x}") | RunnableLambda(lambda _: quick.set()), held=held(llm))
    task = asyncio.create_task(compile(chain).ainvoke({"x": "1"}))
    await quick.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(recorder.cancellation.wait, 10)
    assert recorder.cancelled == ["prog-1"]
    assert recorder.requests["chat"] == 0


async def test_error_at_the_root(llm: ChatMacaw, recorder: Recorder) -> None:
    with pytest.raises(ZeroDivisionError):
        await compile(failing(llm)).ainvoke({"x": "1"})
    await asyncio.to_thread(recorder.cancellation.wait, 10)
    assert recorder.cancelled == ["prog-1"]
    assert recorder.requests["chat"] == 0


def test_error_in_a_step_while_nothing_runs(llm: ChatMacaw, recorder: Recorder) -> None:
    """The program waits for more, and is cancelled."""
    with pytest.raises(ZeroDivisionError):
        compile(ask(llm) | RunnableLambda(lambda _: 1 / 0) | ask(llm, "Then {y}")).invoke({"x": "1"})
    assert recorder.requests == {"program": 1}
    assert recorder.cancelled == ["prog-1"]


def test_run_that_ends_early_by_itself(llm: ChatMacaw, recorder: Recorder) -> None:
    """A step that fails inside a batch is no end of the run: the program is told that nothing follows."""
    fails = RunnableLambda(lambda _: 1 / 0)
    (error,) = compile(ask(llm) | fails | ask(llm, "Then {y}")).batch([{"x": "1"}], return_exceptions=True)
    assert isinstance(error, ZeroDivisionError)
    assert recorder.requests == {"program": 1, "growth": 1}
    assert [(growth.calls, growth.close) for growth in recorder.growths] == [([], True)]
    assert not recorder.cancelled


def test_transform_whose_input_fails(llm: ChatMacaw, recorder: Recorder) -> None:
    def broken() -> Iterator[dict[str, str]]:
        yield {"x": "1"}
        raise ValueError("no more input")

    with pytest.raises(ValueError, match="no more input"):
        list(compile(ask(llm)).transform(broken()))
    assert not recorder.requests


def test_transform_streams_through_what_streams(llm: ChatMacaw) -> None:
    """The first chunk is out before the input has ended, as natively."""
    taken: list[str] = []

    def source() -> Iterator[str]:
        for chunk in ("a", "b"):
            taken.append(chunk)
            yield chunk

    def upper(chunks: Iterator[str]) -> Iterator[str]:
        for chunk in chunks:
            yield chunk.upper()

    for wrap in (lambda chain: chain, compile):
        taken.clear()
        stream = wrap(RunnableParallel(now=upper, later=llm | TEXT)).transform(source())
        assert next(stream) == {"now": "A"}
        assert taken == ["a"]
        list(stream)


# -----------------------------------------------------------------------------------------------------------
# On a real server


@pytest.fixture
def real_llm(local_server: LocalServer) -> Iterator[ChatMacaw]:
    with httpx.Client(timeout=120) as http:
        yield ChatMacaw(
            model="macaw-demo",
            base_url=f"{local_server.url}/v1",
            api_key=TENANTS[0],
            temperature=0,
            max_tokens=2000,
            ignore_eos=True,
            http_client=http,
        )


def test_closed_stream_stops_the_engine(real_llm: ChatMacaw, client: MacawClient) -> None:
    before = {program.id for program in client.list_programs()}
    long = chat("Tell {y}") | real_llm | TEXT
    stream = compile(ask(real_llm.bind(max_tokens=5)) | STEP | long).stream({"x": "1"})
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    (program,) = [program for program in client.list_programs() if program.id not in before]
    for _ in client.events(program.id):
        pass  # to its end
    state = client.get_program(program.id)
    assert state.status == "failed"
    assert state.error is not None
    assert state.error.code == "cancelled"
    assert [call.status for call in state.calls] == ["completed", "failed"]
