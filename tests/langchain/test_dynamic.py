"""Chains whose shape depends on what a model answers: planned as far as known, then grown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from chain_corpus import TEXT, chat
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import (
    ConfigurableField,
    RouterRunnable,
    Runnable,
    RunnableBranch,
    RunnableConfig,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
    RunnableWithMessageHistory,
    chain,
)
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from test_client_steps import Count, ask
from test_corpus import ASYNC_WAYS, WAYS, comparable, tree

from langchain_macaw import ChatMacaw, compile
from scripted_macaw_server import Recorder


@dataclass(frozen=True)
class Case:
    """A chain, and what a run of it takes: calls, growths, and ordinary requests."""

    name: str
    build: Callable[[ChatMacaw, Count], Runnable[Any, Any]]
    num_calls: int
    growths: int
    chats: int = 0
    input: Any = field(default_factory=lambda: {"x": "1"})
    programs: int = 1


def branch(llm: ChatMacaw, count: Count, wanted: int) -> Runnable[Any, Any]:
    """Its conditions look at an answer; the `wanted`-th one holds, and the default if none does."""
    conditions = [count.step(f"condition {i}", lambda text, i=i: i == wanted) for i in range(2)]
    return RunnableBranch(
        (conditions[0], ask(llm, "First {y}")),
        (conditions[1], ask(llm, "Second {y}") | ask(llm, "After {y}")),
        ask(llm, "Neither {y}") | count.step("end"),
    )


def map_over_answer(llm: ChatMacaw, count: Count) -> Runnable[Any, Any]:
    items = count.step("split", lambda text: [{"item": word} for word in text.split()[:4]])
    mapped = ask(llm, "List {x}") | items | ask(llm, "About {item}").map()
    return {"all": mapped} | chat("{{#all}}{{{.}}} {{/all}}", "mustache") | llm | TEXT


def map_of_two_stages(llm: ChatMacaw, count: Count) -> Runnable[Any, Any]:
    items = count.step("split", lambda text: [{"item": word} for word in text.split()[:3]])
    stages = ask(llm, "About {item}") | count.step("inner") | ask(llm, "More of {it}")
    return RunnableParallel(all=ask(llm, "List {x}") | items | stages.map())


def routed(llm: ChatMacaw, count: Count) -> Runnable[Any, Any]:
    maths, poem = ask(llm, "Calculate {y}") | ask(llm, "Check {y}"), ask(llm, "Write {y}")

    def route(text: str) -> Runnable[Any, Any]:
        count.ran["route"] += 1
        return maths if "says" in text else poem

    return ask(llm) | RunnableLambda(route) | ask(llm, "Last {z}")


def routed_with_config(llm: ChatMacaw, count: Count) -> Runnable[Any, Any]:
    poem = ask(llm, "Write {y}")

    async def aroute(text: str, config: RunnableConfig) -> Runnable[Any, Any]:
        return poem

    def route(text: str, config: RunnableConfig) -> Runnable[Any, Any]:
        return poem

    return ask(llm) | RunnableLambda(route, aroute)


def router(llm: ChatMacaw, count: Count) -> Runnable[Any, Any]:
    routes = RouterRunnable({"a": ask(llm, "A {x}"), "b": ask(llm, "B {x}")})
    choose = ask(llm, "Choose {x}") | count.step("key", lambda text: "b")
    return RunnableParallel(key=choose, input=RunnablePassthrough()) | routes | ask(llm, "C {y}")


def alternatives(llm: ChatMacaw, count: Count) -> Runnable[Any, Any]:
    field = ConfigurableField(id="tone")
    rude = ask(llm, "Be rude: {x}") | count.step("rude")
    tone = (ask(llm, "Be nice: {x}") | count.step("nice")).configurable_alternatives(
        field, default_key="nice", rude=rude
    )
    return (tone | ask(llm, "Again {y}")).with_config(configurable={"tone": "rude"})


def fallback_of_a_step(llm: ChatMacaw, count: Count) -> Runnable[Any, Any]:
    """The primary fails in client code, which nobody can know; what follows the fallback is asked for natively."""
    failing = ask(llm) | count.step("fails", lambda _: 1 / 0)
    return failing.with_fallbacks([ask(llm, "Instead {x}")]) | ask(llm, "Then {y}")


def fallback_known_ahead(llm: ChatMacaw, count: Count) -> Runnable[Any, Any]:
    return ask(llm, "Missing {z}").with_fallbacks([ask(llm, "Instead {x}")]) | ask(llm, "Then {y}")


def retried(llm: ChatMacaw, count: Count) -> Runnable[Any, Any]:
    def fail_once(text: str) -> str:
        if count.ran["flaky"] == 1:
            raise ValueError("the first time")
        return text

    step = (ask(llm) | count.step("flaky", fail_once)).with_retry(wait_exponential_jitter=False)
    return step | ask(llm, "Then {y}")


def structured(llm: ChatMacaw, count: Count) -> Runnable[Any, Any]:
    """What `with_structured_output(include_raw=True)` is made of."""
    parsed = count.step("parse", lambda value: {"length": len(value["raw"].text)})
    both = RunnableParallel(raw=llm) | RunnablePassthrough.assign(
        parsed=parsed, error=count.step("error", lambda _: None)
    ).with_fallbacks([RunnablePassthrough.assign(parsed=lambda _: None)], exception_key="error")
    return chat("{x}") | both | ask(llm, "{parsed}")


CASES = [
    Case("branch_first", lambda llm, count: ask(llm) | branch(llm, count, 0), 2, 1),
    Case("branch_second", lambda llm, count: ask(llm) | branch(llm, count, 1) | ask(llm, "Last {z}"), 4, 1),
    Case("branch_default", lambda llm, count: ask(llm) | branch(llm, count, 2), 2, 1),
    Case("branch_on_input", lambda llm, count: branch(llm, count, 1), 2, 0, input={"y": "1"}),
    Case("map_over_answer", map_over_answer, 1 + 4 + 1, 1),
    Case("map_of_two_stages", map_of_two_stages, 1 + 3 + 3, 2),
    Case("routed", routed, 4, 1),
    Case("routed_with_config", routed_with_config, 2, 1),
    Case("router", router, 3, 1),
    Case("alternatives", alternatives, 2, 1),
    Case("fallback_of_a_step", fallback_of_a_step, 3, 1, chats=2),  # the growth closes the program
    Case("fallback_known_ahead", fallback_known_ahead, 2, 0),
    Case("structured", structured, 2, 1),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same(case: Case, way: str, llm: ChatMacaw, recorder: Recorder) -> None:
    run, count, native_count = WAYS[way], Count(), Count()
    expected, prompts = comparable(run(case.build(llm, native_count), case.input)), recorder.prompts
    recorder.clear()
    assert comparable(run(compile(case.build(llm, count)), case.input)) == expected
    check(case, way, recorder, prompts)
    assert count.ran == native_count.ran


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ainvoke", "abatch", "astream", "atransform", "astream_events"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_same_async(case: Case, way: str, llm: ChatMacaw, recorder: Recorder) -> None:
    run, count, native_count = ASYNC_WAYS[way], Count(), Count()
    expected, prompts = comparable(await run(case.build(llm, native_count), case.input)), recorder.prompts
    recorder.clear()
    assert comparable(await run(compile(case.build(llm, count)), case.input)) == expected
    check(case, way, recorder, prompts)
    assert count.ran == native_count.ran


def check(case: Case, way: str, recorder: Recorder, native: Any) -> None:
    """What the server saw of a compiled run, against the prompts of the native run."""
    assert recorder.prompts == native
    if "batch" in way:
        assert recorder.requests["chat"] <= 2 * case.chats
        assert recorder.requests["program"] == 1
        assert recorder.requests["growth"] <= 2 * max(case.growths, 1)
    else:
        assert native.total() == case.num_calls
        assert recorder.requests["program"] == 1
        assert recorder.requests["chat"] == case.chats
        if case.name != "map_of_two_stages":
            assert recorder.requests["growth"] == case.growths
    assert not recorder.cancelled


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_trace(case: Case, llm: ChatMacaw) -> None:
    def trace(wrap: Callable[[Any], Any]) -> list[Any]:
        collector = RunCollectorCallbackHandler()
        wrap(case.build(llm, Count())).invoke(case.input, {"callbacks": [collector], "run_name": "the run"})
        return [tree(run) for run in collector.traced_runs]

    assert trace(compile) == trace(lambda chain: chain)


def test_map_over_an_answer_takes_two_rounds(llm: ChatMacaw, recorder: Recorder) -> None:
    compile(map_over_answer(llm, Count())).invoke({"x": "1"})
    assert [len(program.calls) for program in recorder.programs] == [1]
    assert [(len(growth.calls), growth.close) for growth in recorder.growths] == [(4 + 1, True)]


def test_retry(llm: ChatMacaw, recorder: Recorder) -> None:
    """The second attempt is ordinary requests."""
    count, native_count = Count(), Count()
    expected, prompts = retried(llm, native_count).invoke({"x": "1"}), recorder.prompts
    recorder.clear()
    assert compile(retried(llm, count)).invoke({"x": "1"}) == expected
    assert (count.ran, recorder.prompts) == (native_count.ran, prompts)
    assert recorder.requests == {"program": 1, "chat": 1, "growth": 1}


@pytest.mark.filterwarnings("ignore:.*deprecated in LangChain", "ignore:RunnableWithMessageHistory is deprecated")
async def test_message_history(llm: ChatMacaw, recorder: Recorder) -> None:
    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{x}")])

    def build(store: dict[str, InMemoryChatMessageHistory]) -> Runnable[Any, Any]:
        return RunnableWithMessageHistory(
            prompt | llm | TEXT | RunnablePassthrough(lambda _: None) | ask(llm, "Then {y}"),
            lambda session_id: store.setdefault(session_id, InMemoryChatMessageHistory()),
            input_messages_key="x",
            history_messages_key="history",
        )

    def said(store: dict[str, InMemoryChatMessageHistory]) -> list[Any]:
        return [message.content for message in store["s"].messages]

    config: RunnableConfig = {"configurable": {"session_id": "s"}}
    native_store: dict[str, InMemoryChatMessageHistory] = {}
    store: dict[str, InMemoryChatMessageHistory] = {}
    native, compiled = build(native_store), compile(build(store))
    for word in ("one", "two"):
        expected = native.invoke({"x": word}, config)
        recorder.clear()
        assert compiled.invoke({"x": word}, config) == expected
        assert recorder.requests == {"program": 1}
    expected = await native.ainvoke({"x": "three"}, config)
    recorder.clear()
    assert await compiled.ainvoke({"x": "three"}, config) == expected
    assert recorder.requests == {"program": 1}
    assert said(store) == said(native_store)


def test_function_that_runs_a_chain_itself(llm: ChatMacaw, recorder: Recorder) -> None:
    inner = ask(llm, "Inner {y}")

    @chain
    def outer(text: str) -> str:
        return inner.invoke(text)

    compile(ask(llm) | outer).invoke({"x": "1"})
    assert recorder.requests == {"program": 1, "chat": 1}


def test_growth_that_is_refused_is_ordinary_requests(
    llm: ChatMacaw, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    def down(text: str) -> str:
        recorder.down = True
        return text

    built = ask(llm) | RunnableLambda(down) | ask(llm, "Then {y}") | ask(llm, "Last {z}")
    recorder.down = False
    assert compile(built).invoke({"x": "1"})
    assert recorder.requests["chat"] == 2
    assert caplog.text.count("could not grow") >= 1


def test_bug_in_planning_behind_a_step_does_not_reach_the_chain(
    llm: ChatMacaw, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("langchain_macaw.lowering.Lowering.report", lambda *args: 1 / 0)
    assert compile(ask(llm) | RunnableLambda(lambda text: text) | ask(llm, "Then {y}")).invoke({"x": "1"})
    assert recorder.requests["chat"] == 1
    assert "Planning stopped with ZeroDivisionError" in caplog.text


def test_chain_that_cannot_be_copied_runs_natively(
    llm: ChatMacaw, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.modules["langchain_macaw.compile"], "watched", lambda chain: 1 / 0)
    compiled = compile(ask(llm) | RunnableLambda(lambda text: text) | ask(llm, "Then {y}"))
    assert compiled.invoke({"x": "1"}) == "".join(compiled.transform(iter([{"x": "1"}])))
    assert recorder.requests["chat"] == 2
    assert caplog.text.count("runs without reports of its client steps") == 1
