"""What is seen of a run: result, errors, events, spans, callbacks, token totals, and the prompts at the server."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.span import BaseSpan
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index_instrumentation import root_dispatcher
from pydantic import PrivateAttr

from scripted_macaw_server import Recorder

_RANDOM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UUID = re.compile("-" + _RANDOM_ID.pattern)
_OTHERWISE_EACH_TIME = re.compile(r", macaw={'program_id': '[^']*', 'timings': {}}| at 0x[0-9a-f]+|(chat)?cmpl-[0-9]+")


class _Events(BaseEventHandler):
    _seen: list[Any] = PrivateAttr(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        fields = {name: _text(getattr(event, name, None)) for name in ("messages", "prompt", "response", "output")}
        self._seen.append((event.class_name(), _UUID.sub("", event.span_id or ""), str(fields)))


class _Spans(BaseSpanHandler[BaseSpan]):
    _seen: list[Any] = PrivateAttr(default_factory=list)

    def new_span(self, id_: str, bound_args: Any, *args: Any, parent_span_id: str | None = None, **kwargs: Any) -> Any:
        self._seen.append(("enter", _UUID.sub("", id_), _UUID.sub("", parent_span_id or "")))
        return BaseSpan(id_=id_)

    def prepare_to_exit_span(self, id_: str, *args: Any, result: Any = None, **kwargs: Any) -> Any:
        self._seen.append(("exit", _UUID.sub("", id_), _text(result)))
        return self.open_spans.get(id_)

    def prepare_to_drop_span(self, id_: str, *args: Any, err: Any = None, **kwargs: Any) -> Any:
        self._seen.append(("drop", _UUID.sub("", id_), repr(err)))
        return self.open_spans.get(id_)


class _Callbacks(BaseCallbackHandler):
    def __init__(self) -> None:
        super().__init__([], [])
        self.seen: list[Any] = []

    def on_event_start(
        self, event_type: Any, payload: Any = None, event_id: str = "", parent_id: str = "", **kwargs: Any
    ) -> str:
        self.seen.append(("start", event_type.value, _payload(payload)))
        return event_id

    def on_event_end(self, event_type: Any, payload: Any = None, event_id: str = "", **kwargs: Any) -> None:
        self.seen.append(("end", event_type.value, _payload(payload)))

    def start_trace(self, trace_id: str | None = None) -> None:
        self.seen.append(("trace", trace_id))

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None:
        self.seen.append(("end trace", trace_id))


def _payload(payload: Any) -> str:
    return str({str(name): _text(value) for name, value in (payload or {}).items()})


def _text(value: Any) -> str:
    """What a value says, without ids, addresses, and which program answered when."""
    if isinstance(value, list):
        return str([_text(item) for item in value])
    if inspect.isgenerator(value) or inspect.isasyncgen(value) or hasattr(value, "response_gen"):
        return "a stream"
    if hasattr(value, "__next__") or hasattr(value, "__anext__"):
        return "a stream"
    return _RANDOM_ID.sub("", _OTHERWISE_EACH_TIME.sub("", str(value)))


@dataclass
class Observed:
    """What was seen; equal to another one if nobody could tell the two apart."""

    result: Any = None
    error: Any = None
    events: list[Any] = field(default_factory=list)
    spans: list[Any] = field(default_factory=list)
    callbacks: list[Any] = field(default_factory=list)
    tokens: Any = None
    prompts: Counter[str] = field(default_factory=Counter)

    def in_any_order(self) -> Observed:
        """As sets with multiplicity: branches of asynchronous code overtake each other."""
        lists = {name: sorted(map(str, getattr(self, name))) for name in ("events", "spans", "callbacks")}
        return Observed(self.result, self.error, **lists, tokens=self.tokens, prompts=self.prompts)


class Bench:
    """Runs things under observation.

    Attributes:
        callback_manager: For whatever is run.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._callbacks = _Callbacks()
        self._tokens = TokenCountingHandler(tokenizer=str.split)
        self.callback_manager = CallbackManager([self._callbacks, self._tokens])

    def observe(self, run: Callable[[], Any], *, script: Callable[[str], str | None] | None = None) -> Observed:
        """Run with the server's memory cleared, and answers by `script` if there is one."""
        self.recorder.clear()
        if script:
            self.recorder.script = script
        self._callbacks.seen.clear()
        self._tokens.reset_counts()
        seen = Observed()
        with _listening() as (events, spans):
            try:
                seen.result = self.described(run())
            except Exception as error:
                seen.error = (type(error), str(error))
        seen.events, seen.spans, seen.callbacks = events._seen, spans._seen, list(self._callbacks.seen)
        counts = self._tokens
        seen.tokens = (counts.prompt_llm_token_count, counts.completion_llm_token_count, counts.total_llm_token_count)
        seen.prompts = self.recorder.prompts.copy()
        return seen

    @staticmethod
    def described(response: Any) -> Any:
        """Type, text and sources of a response."""
        if isinstance(response, str):
            return _text(response)
        sources = [_RANDOM_ID.sub("", node.node.node_id) for node in response.source_nodes]
        return type(response), str(response), sources, _RANDOM_ID.sub("", str(response.metadata))


def querying(engine: Any, question: str, *, asynchronous: bool) -> Callable[[], Any]:
    """Asks, and consumes the answer to its end."""

    async def ask() -> Any:
        response = await engine.aquery(question)
        if isinstance(response, AsyncStreamingResponse):
            return await response.get_response()
        return response

    def run() -> Any:
        response = run_async(ask()) if asynchronous else engine.query(question)
        return response.get_response() if isinstance(response, StreamingResponse) else response

    return run


def run_async(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """As `asyncio.run`, which takes the thread's event loop away from pytest."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(coroutine)


class FixedRetriever(BaseRetriever):
    """Always finds the same texts."""

    def __init__(self, texts: list[str], callback_manager: CallbackManager | None = None) -> None:
        super().__init__(callback_manager=callback_manager)
        self.texts = texts

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=TextNode(text=text, id_=f"node-{i}")) for i, text in enumerate(self.texts)]


@contextmanager
def _listening() -> Iterator[tuple[_Events, _Spans]]:
    events, spans = _Events(), _Spans()
    root_dispatcher.add_event_handler(events)
    root_dispatcher.add_span_handler(spans)
    try:
        yield events, spans
    finally:
        root_dispatcher.event_handlers.remove(events)
        root_dispatcher.span_handlers.remove(spans)
