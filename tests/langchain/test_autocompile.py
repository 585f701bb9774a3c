"""`autocompile`: chains run compiled while it is on, once, and nothing of it is left when it is off."""

from __future__ import annotations

import asyncio
import functools
import inspect
import operator
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import langchain_classic.chains  # noqa: F401  (legacy chains are among the classes that are patched)
import pytest
from chain_corpus import CHUNKS, TEXT, chat, map_reduce_mustache
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, RunnableParallel, RunnableSequence
from test_corpus import ASYNC_WAYS, WAYS, comparable

from langchain_macaw import ChatMacaw, autocompile, compile
from langchain_macaw.lowering import Lowering
from scripted_macaw_server import Recorder

VALUE = {"x": "1"}


def methods() -> dict[tuple[type[Any], str], Any]:
    """Every attribute of every Runnable class."""
    kinds, queue = {Runnable}, [Runnable]
    while queue:
        new = set(queue.pop().__subclasses__()) - kinds
        kinds |= new
        queue += new
    return {(kind, name): value for kind in kinds for name, value in vars(kind).items() if callable(value)}


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = methods()
    yield
    after = methods()
    assert [key for key, value in before.items() if after[key] is not value] == []


@pytest.fixture
def _on() -> Iterator[None]:
    autocompile()
    yield
    autocompile(False)


def two_steps(llm: ChatMacaw) -> Runnable[Any, Any]:
    return chat("Ask {x}") | llm | TEXT | chat("Then {y}") | llm | TEXT


@pytest.mark.parametrize("way", [way for way in WAYS if "exceptions" not in way])
def test_every_entry_point(way: str, llm: ChatMacaw, recorder: Recorder) -> None:
    chain = map_reduce_mustache(llm)
    expected, prompts = comparable(WAYS[way](chain, CHUNKS)), recorder.prompts
    recorder.clear()
    with autocompile():
        assert comparable(WAYS[way](chain, CHUNKS)) == expected
    assert recorder.prompts == prompts
    assert recorder.requests == {"program": 1}


@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
@pytest.mark.parametrize("way", [way for way in ASYNC_WAYS if "exceptions" not in way])
async def test_every_async_entry_point(way: str, llm: ChatMacaw, recorder: Recorder) -> None:
    chain = map_reduce_mustache(llm)
    expected, prompts = comparable(await ASYNC_WAYS[way](chain, CHUNKS)), recorder.prompts
    recorder.clear()
    with autocompile():
        assert comparable(await ASYNC_WAYS[way](chain, CHUNKS)) == expected
    assert recorder.prompts == prompts
    assert recorder.requests == {"program": 1}


@pytest.mark.usefixtures("_on")
def test_wrapped_chains_are_one_program(llm: ChatMacaw, recorder: Recorder) -> None:
    chain = two_steps(llm)
    for root in (chain.with_config(tags=["a"]), chain.with_retry(), chain.with_fallbacks([chain]), compile(chain)):
        recorder.clear()
        assert root.invoke(VALUE)
        assert recorder.requests == {"program": 1}


@pytest.mark.usefixtures("_on")
def test_chain_inside_a_client_step_is_a_root_where_nothing_else_is_planned(llm: ChatMacaw, recorder: Recorder) -> None:
    chain = two_steps(llm)
    assert RunnableLambda(chain.invoke).invoke(VALUE) == chain.invoke(VALUE)
    assert recorder.requests == {"program": 2}


@pytest.mark.usefixtures("_on")
def test_model_alone(llm: ChatMacaw, recorder: Recorder) -> None:
    """One call needs no program; several at once are one."""
    assert llm.invoke("hi").content
    assert recorder.requests == {"chat": 1}
    assert len(llm.batch(["a", "b"])) == 2
    assert recorder.requests == {"chat": 1, "program": 1}


@pytest.mark.usefixtures("_on")
def test_chain_without_a_model_of_ours_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lowering, "lower", lambda *args: pytest.fail("planned"))
    assert (RunnableLambda(str) | RunnableLambda(len)).invoke(1234) == 4


class Traced(RunnableSequence[Any, Any]):
    """A user's own class with an `invoke` around LangChain's."""

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        SEEN.append(input)
        return super().invoke(input, config, **kwargs)


SEEN: list[Any] = []


@pytest.mark.usefixtures("_on")
def test_overridden_method_runs_once(llm: ChatMacaw) -> None:
    SEEN.clear()
    assert Traced(chat("{x}"), llm, TEXT).invoke(VALUE)
    assert SEEN == [VALUE]


def test_threads(llm: ChatMacaw, recorder: Recorder) -> None:
    chain = two_steps(llm)
    expected = [chain.invoke({"x": str(i)}) for i in range(8)]
    recorder.clear()

    def run(i: int) -> Any:
        with autocompile():
            return chain.invoke({"x": str(i)})

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(8))) == expected
    assert recorder.requests == {"program": 8}


async def test_tasks(llm: ChatMacaw, recorder: Recorder) -> None:
    chain = two_steps(llm)
    expected = await asyncio.gather(*(chain.ainvoke({"x": str(i)}) for i in range(8)))
    recorder.clear()
    with autocompile():
        assert await asyncio.gather(*(chain.ainvoke({"x": str(i)}) for i in range(8))) == expected
    assert recorder.requests == {"program": 8}


async def test_switched_off_while_a_stream_is_open(llm: ChatMacaw, recorder: Recorder) -> None:
    chain = two_steps(llm)
    with autocompile():
        stream = chain.astream(VALUE)
        first = await anext(stream)
    rest = [chunk async for chunk in stream]
    assert recorder.requests == {"program": 1}
    assert functools.reduce(operator.add, rest, first) == await chain.ainvoke(VALUE)
    assert recorder.requests == {"program": 1, "chat": 2}


def test_blocks_and_the_switch(llm: ChatMacaw, recorder: Recorder) -> None:
    def is_on() -> bool:
        recorder.clear()
        two_steps(llm).invoke(VALUE)
        return recorder.requests["program"] == 1

    assert not is_on()
    autocompile()
    autocompile()  # twice is once
    with autocompile():
        assert is_on()
    assert is_on()
    with autocompile():
        autocompile(False)
        assert is_on(), "the block is still open"
    assert not is_on()
    with pytest.raises(ZeroDivisionError), autocompile():
        1 / 0  # noqa: B018
    assert not is_on()


def test_planner_failure_runs_natively_and_says_so_once(
    llm: ChatMacaw, recorder: Recorder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lowering, "lower", lambda *args: 1 / 0)
    chain = chat("{x}") | llm | TEXT
    with autocompile():
        assert chain.invoke(VALUE) == chain.invoke(VALUE)
    assert recorder.requests == {"chat": 2}
    assert caplog.text.count("planning failed with ZeroDivisionError") == 1


@pytest.mark.usefixtures("_on")
def test_methods_are_of_the_same_kind() -> None:
    assert inspect.isgeneratorfunction(RunnableSequence.stream)
    assert inspect.isasyncgenfunction(RunnableParallel.astream)
    assert inspect.iscoroutinefunction(Runnable.abatch)
    assert list(inspect.signature(RunnableSequence.invoke).parameters) == ["self", "input", "config", "kwargs"]
