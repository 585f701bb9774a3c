"""What the server is told of each request's place, with no change to the application."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import httpx
import openai
import pytest
from llama_index.core import PromptHelper
from llama_index.core.async_utils import run_jobs
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.llms import ChatMessage
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import Accumulate, Refine, TreeSummarize
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.workflow import Context, Event, StartEvent, StopEvent, Workflow, step
from llama_index_instrumentation import root_dispatcher

from llama_index.llms.macaw import Macaw, hints
from llama_index_macaw.observing import run_async
from macaw.errors import ContextLengthError
from scripted_macaw_server import Recorder

TEXTS = [f"part {i} of the text" for i in range(4)]
LONG = [f"part {i} " + "of the text " * 25 for i in range(4)]
dispatcher = get_dispatcher(__name__)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    yield
    gc.collect()
    assert hints._groups == {}
    assert hints._HANDLER.open_spans == {}
    assert hints._HANDLER.completed_spans == hints._HANDLER.dropped_spans == []


@pytest.fixture
def seen(recorder: Recorder) -> list[dict[str, Any]]:
    return recorder.hints


class Fixed(BaseRetriever):
    """Finds the same nodes for each question."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]


def engine(llm: Macaw, **synthesizer: Any) -> BaseQueryEngine:
    return RetrieverQueryEngine(Fixed(), response_synthesizer=Accumulate(llm=llm, **synthesizer))


def test_a_lone_call_has_none(llm: Macaw, recorder: Recorder) -> None:
    llm.complete("hi")
    llm.chat([ChatMessage("hi")])
    list(llm.stream_complete("hi"))
    run_async(llm.acomplete("hi"))
    assert recorder.requests == {"chat": 4}
    assert recorder.hints == []


def test_groups_of_a_tree(llm: Macaw, seen: list[dict[str, Any]]) -> None:
    """Each level is a group, of which the server knows the size before it starts."""
    helper = PromptHelper(chunk_size_limit=100)
    TreeSummarize(llm=llm, use_async=True, prompt_helper=helper).get_response("What?", LONG)
    assert len({hint["app"] for hint in seen}) == 1
    assert seen[0]["app"].startswith("TreeSummarize.get_response-")
    levels = [[hint for hint in seen if hint["stage"] == stage] for stage in range(seen[-1]["stage"] + 1)]
    assert len(levels) > 1
    for level in levels[:-1]:
        assert {hint["group_size"] for hint in level} == {len(level)}
        assert len({hint["group"] for hint in level}) == 1
    [last] = levels[-1]
    assert "group" not in last


def test_what_comes_one_after_the_other_is_no_group(llm: Macaw, seen: list[dict[str, Any]]) -> None:
    Refine(llm=llm).get_response("What?", LONG)
    assert [hint["stage"] for hint in seen] == [0, 1, 2, 3]
    assert not any("group" in hint for hint in seen)
    seen.clear()
    run_async(Refine(llm=llm).aget_response("What?", LONG))
    assert [hint["stage"] for hint in seen] == [0, 1, 2, 3]
    assert not any("group" in hint for hint in seen)


def test_queries_at_the_same_time_are_applications_of_their_own(llm: Macaw, seen: list[dict[str, Any]]) -> None:
    async def both() -> None:
        one = engine(llm, use_async=True)
        await asyncio.gather(one.aquery("First?"), one.aquery("Second?"))

    run_async(both())
    apps = {hint["app"] for hint in seen}
    assert len(apps) == len({hint["group"] for hint in seen}) == 2
    assert all(app.startswith("RetrieverQueryEngine.aquery-") for app in apps)
    assert {hint["group_size"] for hint in seen} == {len(TEXTS)}


def test_workers_are_one_group(llm: Macaw, seen: list[dict[str, Any]]) -> None:
    """Also those that start when others have ended."""
    run_async(run_jobs([llm.acomplete(text) for text in TEXTS * 2], workers=4))
    assert len(seen) == 8
    assert {hint["group"] for hint in seen[:4]} == {seen[0]["group"]}
    assert seen[0]["group"].startswith("run_jobs-")
    assert {hint["group_size"] for hint in seen[:4]} == {4}


def test_threads_share_a_group(llm: Macaw, recorder: Recorder, seen: list[dict[str, Any]]) -> None:
    """The second one starts while the first one waits for its answer."""
    second_has_come = threading.Event()

    def answer(prompt: str) -> str:
        if prompt == "second":
            second_has_come.set()
        return "done"

    class WaitForSecond(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            if b"first" in request.content:
                first_is_under_way.set()
                assert second_has_come.wait(timeout=30)
            return wire.handle_request(request)

    @dispatcher.span
    def both() -> None:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(copy_context().run, waiting.complete, "first")
            assert first_is_under_way.wait(timeout=30)
            pool.submit(copy_context().run, waiting.complete, "second").result()
            first.result()

    recorder.script = answer
    first_is_under_way = threading.Event()
    with httpx.HTTPTransport() as wire, httpx.Client(transport=WaitForSecond()) as client:
        waiting = Macaw(model="m", api_base=llm.api_base, http_client=client)
        both()
    assert seen[0]["group_size"] == 2


class Part(Event):
    text: str


class Done(Event):
    text: str


class MapReduce(Workflow):
    """Maps on two workers, and reduces."""

    def __init__(self, llm: Macaw, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.llm = llm

    @step
    async def split(self, ctx: Context, event: StartEvent) -> Part | None:
        await self.llm.acomplete("Plan")
        for text in TEXTS:
            ctx.send_event(Part(text=text))
        return None

    @step(num_workers=4)
    async def map(self, event: Part) -> Done:
        return Done(text=(await self.llm.acomplete(event.text)).text)

    @step
    async def reduce(self, ctx: Context, event: Done) -> StopEvent | None:
        if ctx.collect_events(event, [Done] * len(TEXTS)) is None:
            return None
        text = ""
        async for chunk in await self.llm.astream_complete("Combine"):
            text = chunk.text
        return StopEvent(result=text)


class TogetherTransport(httpx.AsyncHTTPTransport):
    """Sends the requests of maps when all have come."""

    def __init__(self) -> None:
        super().__init__()
        self._barrier = asyncio.Barrier(len(TEXTS))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if b"part" in request.content:
            await self._barrier.wait()
        return await super().handle_async_request(request)


def test_workflow(llm: Macaw, seen: list[dict[str, Any]]) -> None:
    async def run() -> Any:
        async with httpx.AsyncClient(transport=TogetherTransport()) as client:
            mapping = Macaw(model="m", api_base=llm.api_base, async_http_client=client)
            handler = MapReduce(llm=mapping, timeout=30).run()
            return getattr(handler, "run_id", None), await handler

    run_id, result = run_async(run())
    assert "says" in result
    [app] = {hint["app"] for hint in seen}
    assert app == run_id or app.startswith("MapReduce.run-")
    plan, *maps, last = seen
    assert (plan["stage"], {hint["stage"] for hint in maps}, last["stage"]) == (0, {1}, 2)
    assert "group" not in plan
    assert "group" not in last
    [group] = {hint["group"] for hint in maps if "group" in hint}
    assert group.endswith("/MapReduce.map/1")
    assert max(hint["group_size"] for hint in maps if "group" in hint) == len(TEXTS)


def test_query_in_a_workflow_is_part_of_its_run(llm: Macaw, seen: list[dict[str, Any]]) -> None:
    class Ask(Workflow):
        @step
        async def ask(self, event: StartEvent) -> StopEvent:
            return StopEvent(result=str(await engine(llm, use_async=True).aquery("What?")))

    async def run() -> Any:
        await Ask(timeout=30).run()

    run_async(run())
    [app] = {hint["app"] for hint in seen}
    assert "RetrieverQueryEngine" not in app
    assert {hint["group_size"] for hint in seen} == {len(TEXTS)}


def test_streams_are_placed_where_they_are_called(llm: Macaw, seen: list[dict[str, Any]]) -> None:
    """Their requests are sent later, from elsewhere."""

    @dispatcher.span
    def call() -> Any:
        return llm.stream_complete("Hello")

    @dispatcher.span
    async def acall() -> Any:
        return await asyncio.gather(*[llm.astream_complete(text) for text in TEXTS])

    list(call())
    assert seen.pop()["app"].startswith("test_streams_are_placed_where_they_are_called.<locals>.call-")

    async def consume() -> None:
        for stream in await acall():
            async for _ in stream:
                pass

    run_async(consume())
    assert {hint["group_size"] for hint in seen} == {len(TEXTS)}


def test_streams_that_nobody_reads_leave_nothing(llm: Macaw, recorder: Recorder) -> None:
    @dispatcher.span
    def call() -> Any:
        return llm.stream_complete("Hello")

    call().close()
    assert recorder.requests == {}


def test_switched_off(server_url: str, seen: list[dict[str, Any]]) -> None:
    Refine(llm=Macaw(api_base=server_url, hints=False)).get_response("What?", LONG)
    assert seen == []


def test_failed_and_cancelled_requests_leave_nothing(llm: Macaw, recorder: Recorder) -> None:
    """See `_nothing_is_left`."""

    def too_long(prompt: str) -> str:
        raise ContextLengthError("Too long.")

    async def cancelled() -> None:
        task = asyncio.create_task(TreeSummarize(llm=llm, use_async=True).aget_response("What?", TEXTS))
        await asyncio.sleep(0)
        assert hints._groups
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_async(cancelled())
    recorder.script = too_long
    with pytest.raises(openai.BadRequestError):
        run_async(engine(llm, use_async=True).aquery("What?"))


def test_hints_never_fail_a_request(
    llm: Macaw, seen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hints, "_parent_of", None)
    assert Refine(llm=llm).get_response("What?", TEXTS[:1])
    assert seen == []
    assert "No hints for a request" in caplog.text


def test_the_handler_is_installed_once(llm: Macaw) -> None:
    Macaw(model="m")
    assert sum(handler is hints._HANDLER for handler in root_dispatcher.span_handlers) == 1
