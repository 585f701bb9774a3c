"""Hints without `compile`: what unchanged chains and graphs say of their requests."""

from __future__ import annotations

import asyncio
import json
import operator
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, TypedDict

import httpx
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from langchain_macaw import ChatMacaw, MacawLLM
from langchain_macaw import hints as hints_module
from langchain_macaw.hints import follower

Hints = dict[str, Any]


class Wire(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Notes the hints of requests that pass, by the last word of their prompt."""

    def __init__(self) -> None:
        self.hints: dict[str, Hints | None] = {}
        self._sync, self._async = httpx.HTTPTransport(), httpx.AsyncHTTPTransport()
        self._lock = threading.Lock()

    def close(self) -> None:
        self._sync.close()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self._note(request)
        return self._sync.handle_request(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._note(request)
        return await self._async.handle_async_request(request)

    def _note(self, request: httpx.Request) -> None:
        body = json.loads(request.content)
        with self._lock:
            self.hints[body["messages"][-1]["content"].split()[-1]] = body.get("macaw")

    async def aclose(self) -> None:
        await self._async.aclose()


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
async def model(server_url: str, wire: Wire) -> AsyncIterator[ChatMacaw]:
    with httpx.Client(transport=wire) as http:
        async with httpx.AsyncClient(transport=wire) as aclient:
            yield ChatMacaw(model="m", base_url=server_url, http_client=http, http_async_client=aclient)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Runs that have ended are forgotten."""
    before = len(follower())
    yield
    assert len(follower()) == before


def ask(model: Any, text: str) -> Runnable[Any, str]:
    return ChatPromptTemplate.from_template(text) | model | StrOutputParser()


def draft_review_publish(model: Any) -> Runnable[Any, Any]:
    return (
        {"text": ask(model, "Say {topic} DRAFT")}
        | RunnableLambda(lambda x: x)
        | {"a": ask(model, "See {text} ONE"), "b": ask(model, "See {text} TWO")}
        | ask(model, "Take {a} {b} LAST")
    )


async def run(chain: Runnable[Any, Any], way: str, value: Any) -> None:
    match way:
        case "invoke":
            chain.invoke(value)
        case "ainvoke":
            await chain.ainvoke(value)
        case "stream":
            list(chain.stream(value))
        case "astream":
            [chunk async for chunk in chain.astream(value)]
        case "astream_events":
            [event async for event in chain.astream_events(value, version="v2")]
        case "batch":
            chain.batch([value])
        case "abatch":
            await chain.abatch([value])


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream", "astream_events", "batch", "abatch"])
async def test_a_chain_is_one_app_with_stages_and_groups(model: ChatMacaw, wire: Wire, way: str) -> None:
    await run(draft_review_publish(model), way, {"topic": "macaws"})
    draft, one, two, last = (wire.hints[word] or {} for word in ("DRAFT", "ONE", "TWO", "LAST"))
    assert len({one["app"], two["app"], draft["app"], last["app"]}) == 1
    assert [h["stage"] for h in (draft, one, two, last)] == [0, 1, 1, 2]
    assert one["group"] == two["group"]
    assert "group" not in draft
    assert "group" not in last


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "batch", "abatch"])
async def test_a_map_is_a_group_of_known_size_at_each_stage(model: ChatMacaw, wire: Wire, way: str) -> None:
    summary: Runnable[Any, Any] = ask(model, "Sum {x} A{x}") | (lambda text: {"text": text[:3]})
    steps = RunnableLambda(lambda n: [{"x": i} for i in range(n)]) | summary.map() | ask(model, "All {input} END")
    await run(RunnableLambda(lambda n: n) | steps, way, 3)
    members = [wire.hints[f"A{i}"] or {} for i in range(3)]
    assert [h["stage"] for h in members] == [0, 0, 0]
    assert len({h["group"] for h in members}) == 1
    assert {h["group_size"] for h in members} == {3}
    assert (wire.hints["END"] or {})["stage"] == 1


async def test_calls_that_a_function_makes_at_once_are_a_group(model: ChatMacaw, wire: Wire) -> None:
    async def gather(topic: str) -> list[str]:
        return await asyncio.gather(*(ask(model, f"{{t}} W{i}").ainvoke({"t": topic}) for i in range(3)))

    await RunnableLambda(gather).ainvoke("x")
    members = [wire.hints[f"W{i}"] or {} for i in range(3)]
    assert len({h["group"] for h in members}) == len({h["app"] for h in members}) == 1


def test_runs_of_one_root_are_told_apart_from_others(model: ChatMacaw, wire: Wire) -> None:
    chain = RunnableLambda(lambda x: x) | ask(model, "{x}")
    chain.batch([{"x": "P"}, {"x": "Q"}])
    assert (wire.hints["P"] or {})["app"] != (wire.hints["Q"] or {})["app"]


def test_a_call_by_itself_has_no_hints(model: ChatMacaw, wire: Wire) -> None:
    model.invoke("alone")
    assert wire.hints == {"alone": None}


def test_hints_can_be_switched_off_and_overridden(model: ChatMacaw, wire: Wire) -> None:
    off = model.model_copy(update={"hints": False})
    own = model.model_copy(update={"extra_body": {"macaw": {"app": "mine"}}})
    (ask(off, "{x} OFF") | ask(own, "{input} OWN")).invoke({"x": 1}, {"metadata": {"macaw_objective": "throughput"}})
    assert wire.hints["OFF"] is None
    assert wire.hints["OWN"] == {"app": "mine", "stage": 1, "objective": "throughput"}


def test_a_failure_in_the_handler_is_not_the_users(
    model: ChatMacaw, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(hints_module, "_group", fail)
    assert ask(model, "{x} FINE").invoke({"x": 1})
    monkeypatch.setattr(hints_module, "_read_langgraph", fail)
    assert ask(model, "{x} ALSO").invoke({"x": 1})
    assert wire.hints == {"FINE": None, "ALSO": None}


def test_runs_end_with_errors_and_abandoned_streams_too(model: ChatMacaw) -> None:
    def fail(_: Any) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        (ask(model, "{x}") | RunnableLambda(fail)).invoke({"x": 1})
    chunks = ask(model, "{x}").stream({"x": 1})
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]


def test_what_never_ends_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints_module, "MAX_RUNS", 5)
    handler = hints_module.RunFollower()
    for i in range(20):
        handler.on_chain_start(None, {}, run_id=hints_module.UUID(int=i))
    assert len(handler) == 5


def test_a_stream_that_is_collected_while_a_run_begins() -> None:
    """A garbage collection closes it, in the middle of the handler's work."""
    handler = hints_module.RunFollower()
    stream, run = hints_module.UUID(int=1), hints_module.UUID(int=2)

    class Collecting(dict[str, Any]):
        def get(self, *_: Any) -> Any:
            handler.on_llm_error(GeneratorExit(), run_id=stream)

    handler.on_chat_model_start(None, [], run_id=stream)
    handler.on_chain_start(None, {}, run_id=run, metadata=Collecting({"a": 1}))
    assert len(handler) == 1


async def test_traces_show_nothing_of_it(model: ChatMacaw) -> None:
    class Names(BaseCallbackHandler):
        def __init__(self) -> None:
            self.names: list[str] = []

        def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
            self.names.append(str(kwargs.get("name")))

        def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
            assert "extra_body" not in kwargs["invocation_params"]
            self.names.append(str(kwargs.get("name")))

    on, off = Names(), Names()
    for handler, one in ((on, model), (off, model.model_copy(update={"hints": False}))):
        await draft_review_publish(one).ainvoke({"topic": "x"}, {"callbacks": [handler]})
    assert sorted(on.names) == sorted(off.names)


class State(TypedDict, total=False):
    topics: list[str]
    texts: Annotated[list[str], operator.add]
    topic: str
    end: str


def graph(model: ChatMacaw) -> Any:
    """Plan, write about each topic (`Send`), two reviews side by side, publish."""

    def write(state: State) -> State:
        return {"texts": [ask(model, "{x} " + state["topic"]).invoke({"x": 1})]}

    async def awrite(state: State) -> State:
        return {"texts": [await ask(model, "{x} " + state["topic"]).ainvoke({"x": 1})]}

    def node(word: str) -> Any:
        def call(state: State) -> State:
            return {"end": str(model.invoke(f"Do {word}").content)} if word == "PUBLISH" else {"texts": [word]}

        return call

    builder = StateGraph(State)
    builder.add_node(
        "plan", lambda state: {"texts": [str(model.invoke("Do PLAN").content)], "topics": ["T0", "T1", "T2"]}
    )
    builder.add_node("write", RunnableLambda(write, awrite))
    builder.add_node("publish", node("PUBLISH"))
    builder.add_edge(START, "plan")
    builder.add_conditional_edges(
        "plan", lambda state: [Send("write", {"topic": t}) for t in state["topics"]], ["write"]
    )
    builder.add_edge("write", "publish")
    builder.add_edge("publish", END)
    return builder.compile()


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream", "astream_events"])
async def test_a_graph_is_one_app_and_send_is_a_group(model: ChatMacaw, wire: Wire, way: str) -> None:
    await run(graph(model), way, {"topics": []})
    plan, publish, *writers = (wire.hints[word] or {} for word in ("PLAN", "PUBLISH", "T0", "T1", "T2"))
    assert len({h["app"] for h in (plan, publish, *writers)}) == 1
    assert len({h["group"] for h in writers}) == 1
    assert [h["stage"] for h in (plan, *writers, publish)] == [0, 1, 1, 1, 2]
    assert "group" not in plan
    assert "group" not in publish


def test_a_text_model_says_the_same(local_server: Any) -> None:
    bodies: list[Any] = []
    with httpx.Client(event_hooks={"request": [lambda request: bodies.append(json.loads(request.content))]}) as http:
        llm = MacawLLM(
            model="macaw-demo", base_url=f"{local_server.url}/v1", api_key="tenant-a", max_tokens=2, http_client=http
        )
        (llm | llm).invoke("Hello")
    assert [body["macaw"]["stage"] for body in bodies] == [0, 1]
    assert bodies[0]["macaw"]["app"] == bodies[1]["macaw"]["app"]
