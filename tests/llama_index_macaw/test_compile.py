"""Compiled against plain: nobody can tell the two apart, but by the requests that are sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index_macaw.observing import Bench, FixedRetriever, querying
from scripted_macaw_server import Recorder

from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.llms.macaw import Macaw, compile
from llama_index.llms.macaw.running import CURRENT_RUN
from macaw.errors import ContextLengthError, EngineFailedError

MODES = [mode.value for mode in ResponseMode if mode.value not in ("no_text", "context_only")]
TEXTS = [f"Part {i} of the story. " + f"The macaw number {i} flies and eats nuts. " * 14 for i in range(6)]
QUESTION = "What does it eat?"

Script = Callable[[str], str | None]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    yield
    assert CURRENT_RUN.get() is None
    assert "macaw-program" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def bench(recorder: Recorder) -> Bench:
    return Bench(recorder)


@pytest.fixture
def build(server_url: str, bench: Bench) -> Callable[..., RetrieverQueryEngine]:
    """An engine as a user would build it; chunks are packed into prompts of 200 tokens."""

    def build(mode: str, *, chat: bool = True, streaming: bool = False, size: int = 200, **kwargs: Any) -> Any:
        llm = Macaw(
            model="m",
            api_base=server_url,
            is_chat_model=chat,
            is_function_calling_model=False,
            context_window=2000,
            max_tokens=64,
            max_retries=0,
            callback_manager=bench.callback_manager,
        )
        helper = PromptHelper(context_window=2000, num_output=64, chunk_size_limit=size)
        synthesizer = get_response_synthesizer(
            llm=llm,
            prompt_helper=helper,
            response_mode=ResponseMode(mode),
            streaming=streaming,
            callback_manager=bench.callback_manager,
            **kwargs,
        )
        retriever = FixedRetriever(TEXTS, bench.callback_manager)
        return RetrieverQueryEngine(retriever, synthesizer, callback_manager=bench.callback_manager)

    return build


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("mode", MODES)
def test_one_program_and_everything_else_as_before(
    mode: str, asynchronous: bool, streaming: bool, chat: bool, build: Any, bench: Bench, recorder: Recorder
) -> None:
    engine = build(mode, chat=chat, streaming=streaming)
    expected = bench.observe(querying(engine, QUESTION, asynchronous=asynchronous))
    actual = bench.observe(querying(compile(engine), QUESTION, asynchronous=asynchronous))
    if asynchronous:
        expected, actual = expected.in_any_order(), actual.in_any_order()
    for x, y in zip(actual.spans, expected.spans):
        assert x == y
    assert actual == expected
    if "accumulate" in mode and streaming:
        assert expected.error == (ValueError, "Unable to stream in Accumulate response mode")
        assert not recorder.requests
    else:
        assert expected.prompts.total() == {"simple_summarize": 1, "generation": 1}.get(mode) or 5
        assert recorder.requests == {"program": 1}
