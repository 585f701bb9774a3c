"""Client steps in the middle of a chain: each runs once, natively, and planning goes on behind it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from chain_corpus import TEXT, chat
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import CommaSeparatedListOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import (
    Runnable,
    RunnableGenerator,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_core.tools import tool
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from pydantic import BaseModel
from test_corpus import ASYNC_WAYS, WAYS, comparable, tree

from langchain_macaw import ChatMacaw, compile
from langchain_macaw.plan import CURRENT_PLAN
from scripted_macaw_server import Recorder


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    assert CURRENT_PLAN.get() is None
    assert not {"macaw-program", "macaw-growth"} & {thread.name for thread in threading.enumerate()}


@dataclass
class Count:
    """How often each client step ran."""

    ran: Counter[str] = field(default_factory=Counter)

    def step(self, name: str, function: Callable[[Any], Any] = lambda value: value) -> RunnableLambda[Any, Any]:
        def run(value: Any) -> Any:
            self.ran[name] += 1
            return function(value)

        return RunnableLambda(run)


class Docs(BaseRetriever):
    """Two documents about anything."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [Document(f"{query} {i}", metadata={"source": str(i)}) for i in range(2)]


class Named(BaseModel):
    """What the scripted server answers to JSON."""

    name: str
    length: int


def upper(text: Iterator[str]) -> Iterator[str]:
    for chunk in text:
        yield chunk.upper()


async def aupper(text: AsyncIterator[str]) -> AsyncIterator[str]:
    async for chunk in text:
        yield chunk.upper()


@tool
def shout(text: str) -> str:
    """Say it louder."""
    return f"{text}!"


@dataclass(frozen=True)
class Case:
    """A chain, its input, and the requests of a compiled run; natively there are `num_calls`."""

    name: str
    build: Callable[[ChatMacaw, Count], Runnable[Any, Any]]
    num_calls: int
    growths: int
    input: Any = field(default_factory=lambda: {"x": "1"})


def ask(llm: ChatMacaw, what: str = "Ask {x}") -> Runnable[Any, Any]:
    return chat(what) | llm | TEXT


def joined(docs: list[Document]) -> str:
    return " ".join(doc.page_content for doc in docs)


def retrieval(llm: ChatMacaw, count: Count) -> Runnable[Any, Any]:
    context = {"docs": (lambda value: value["x"]) | Docs() | count.step("join", joined), "x": RunnablePassthrough()}
    return context | ask(llm, "From {docs}: {x}") | ask(llm, "Then {y}")


def map_behind_retriever(llm: ChatMacaw, count: Count) -> Runnable[Any, Any]:
    texts = count.step("texts", lambda docs: [{"text": doc.page_content} for doc in docs])
    summaries = (lambda value: value["x"]) | Docs() | texts | ask(llm, "Sum {text}").map()
    return {"all": summaries} | chat("{{#all}}{{{.}}}{{/all}}", "mustache") | llm | TEXT


PAIR = [{"x": "1"}, {"x": "2"}]
CASES = [
    Case("before", lambda llm, count: count.step("a") | ask(llm), 1, 0),
    Case("behind", lambda llm, count: ask(llm) | count.step("a"), 1, 0),
    Case("between", lambda llm, count: ask(llm) | count.step("a") | ask(llm, "Then {y}") | count.step("b"), 2, 1),
    Case(
        "two_between",
        lambda llm, count: ask(llm) | count.step("a") | ask(llm, "2 {y}") | count.step("b") | ask(llm, "3 {z}"),
        3,
        2,
    ),
    Case(
        "static_behind",
        lambda llm, count: ask(llm) | count.step("a") | ask(llm, "2 {y}") | ask(llm, "3 {y}"),
        3,
        1,
    ),
    Case(
        "beside",
        lambda llm, count: RunnableParallel(x=ask(llm), c=count.step("a")) | chat("{x} {c}") | llm,
        2,
        1,
    ),
    Case(
        "unused",
        lambda llm, count: RunnableParallel(x=ask(llm), c=count.step("a")) | chat("Only {x}") | llm,
        2,
        0,
    ),
    Case(
        "assigned",
        lambda llm, count: RunnablePassthrough.assign(c=count.step("a")) | chat("{x}: {c}") | llm,
        1,
        0,
    ),
    Case(
        "in_a_map",
        lambda llm, count: {"all": (ask(llm) | count.step("a") | chat("Then {y}") | llm).map()} | count.step("b"),
        4,
        1,
        PAIR,
    ),
    Case("before_a_map", lambda llm, count: count.step("a") | ask(llm).map(), 2, 0, PAIR),
    Case("generator", lambda llm, count: ask(llm) | RunnableGenerator(upper, aupper) | chat("Louder {y}") | llm, 2, 1),
    Case(
        "tool",
        lambda llm, count: ask(llm) | count.step("a", lambda t: {"text": t}) | shout | chat("Tool {y}") | llm,
        2,
        1,
    ),
    Case(
        "json",
        lambda llm, count: chat("{x} as JSON") | llm | JsonOutputParser() | chat("{name}, {length}") | llm,
        2,
        1,
    ),
    Case(
        "pydantic",
        lambda llm, count: (
            chat("{x} as JSON")
            | llm
            | PydanticOutputParser(pydantic_object=Named)
            | count.step("a", lambda named: {"name": named.name})
            | chat("{name}")
            | llm
        ),
        2,
        1,
    ),
    Case(
        "list_parser",
        lambda llm, count: ask(llm) | CommaSeparatedListOutputParser() | count.step("a", len) | chat("{n} items") | llm,
        2,
        1,
    ),
    Case(
        "template_that_reads",
        lambda llm, count: ask(llm) | chat("{{ y | upper }} {{ y | length }}", "jinja2") | llm,
        2,
        1,
    ),
    Case("retrieval", retrieval, 2, 0),
    Case("map_behind_retriever", map_behind_retriever, 3, 0),
    Case(
        "function_beside_the_way",
        lambda llm, count: (
            RunnablePassthrough(count.step("a").func) | ask(llm) | RunnablePassthrough(count.step("b").func)
        ),
        1,
        0,
    ),
    Case(
        "other_model",
        lambda llm, count: (
            chat("Ask {x}") | FakeListChatModel(responses=["fake"]) | TEXT | ask(llm, "2 {y}") | ask(llm, "3 {y}")
        ),
        2,
        0,
    ),
    Case(
        "whole_message_in_text",
        lambda llm, count: ask(llm) | RunnableLambda(lambda text: {"m": text}) | chat("{m}") | llm | count.step("a"),
        2,
        1,
    ),
]


@pytest.mark.parametrize("way", [way for way in WAYS if "exceptions" not in way])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same(case: Case, way: str, llm: ChatMacaw, recorder: Recorder) -> None:
    count = Count()
    chain, run = case.build(llm, count), WAYS[way]
    expected, prompts, ran = comparable(run(chain, case.input)), recorder.prompts, count.ran
    recorder.clear()
    count.ran = Counter()
    assert comparable(run(compile(chain), case.input)) == expected
    check(case, way, recorder, prompts)
    assert count.ran == ran


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
@pytest.mark.parametrize("way", [way for way in ASYNC_WAYS if "exceptions" not in way])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_same_async(case: Case, way: str, llm: ChatMacaw, recorder: Recorder) -> None:
    count = Count()
    chain, run = case.build(llm, count), ASYNC_WAYS[way]
    expected, prompts, ran = comparable(await run(chain, case.input)), recorder.prompts, count.ran
    recorder.clear()
    count.ran = Counter()
    assert comparable(await run(compile(chain), case.input)) == expected
    check(case, way, recorder, prompts)
    assert count.ran == ran


def check(case: Case, way: str, recorder: Recorder, native: Counter[str]) -> None:
    """What the server saw of a compiled run, against the prompts of the native run."""
    assert recorder.prompts == native
    assert recorder.requests["chat"] == 0
    assert recorder.requests["program"] == 1
    if "batch" in way:  # its inputs go their own ways side by side, and what comes together is sent together
        assert native.total() == 2 * case.num_calls
        assert case.growths <= recorder.requests["growth"] <= 2 * max(case.growths, 1)
    else:
        assert native.total() == case.num_calls
        assert recorder.requests["growth"] == case.growths
    assert not recorder.cancelled


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_trace(case: Case, llm: ChatMacaw) -> None:
    def trace(chain: Runnable[Any, Any]) -> list[Any]:
        collector = RunCollectorCallbackHandler()
        chain.invoke(case.input, {"callbacks": [collector], "run_name": "the run"})
        return [tree(run) for run in collector.traced_runs]

    chain = case.build(llm, Count())
    native = trace(chain)
    assert len(native) == 1
    assert trace(compile(chain)) == native


def test_bad_input_does_not_stop_the_planning_of_others(llm: ChatMacaw, recorder: Recorder) -> None:
    chain = RunnablePassthrough.assign(c=Count().step("c")) | chat("{x}: {c}") | llm | TEXT
    outputs = compile(chain).batch([{"x": "1"}, {"no": "x"}, {"x": "2"}], return_exceptions=True)
    assert [isinstance(output, KeyError) for output in outputs] == [False, True, False]
    assert recorder.requests["chat"] == 0
    assert sum(len(growth.calls) for growth in recorder.growths) + len(recorder.programs[0].calls) == 2


def test_program_that_is_still_open_at_the_end_is_closed(llm: ChatMacaw, recorder: Recorder) -> None:
    """One client step brings a growth, then a failure ends the run: nothing is left waiting."""
    chain = chat("{x}") | llm | TEXT | Count().step("a") | chat("Then {y}") | llm | TEXT | RunnableLambda(no_more) | llm
    with pytest.raises(ZeroDivisionError):
        compile(chain).invoke({"x": "1"})
    assert recorder.requests["program"] == 1


def no_more(value: Any) -> Any:
    raise ZeroDivisionError
