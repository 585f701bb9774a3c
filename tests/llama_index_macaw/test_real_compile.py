"""`compile` on a real server: what the engine computed, what it shares, and that it stops."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from llama_index.core import PromptTemplate
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer

from conftest import TENANTS
from llama_index.llms.macaw import Macaw, compile
from llama_index_macaw.observing import FixedRetriever, querying, run_async
from macaw import MacawClient
from macaw_server.serve import LocalServer

TEXTS = [f"Part {i}. " + f"The macaw number {i} flies, eats nuts and talks. " * 11 for i in range(4)]
CONTEXT_FIRST = PromptTemplate("{context_str}\nQuestion: {query_str}\nAnswer: ")


@pytest.fixture
def build(local_server: LocalServer) -> Callable[..., RetrieverQueryEngine]:
    def build(mode: str, *, chat: bool = True, streaming: bool = False, max_tokens: int = 8, **kwargs: Any) -> Any:
        llm = Macaw(
            "macaw-demo",
            api_base=local_server.url,
            api_key=TENANTS[0],
            is_chat_model=chat,
            temperature=0,
            max_tokens=max_tokens,
            additional_kwargs={"ignore_eos": True},
        )
        helper = PromptHelper(context_window=2048, num_output=max_tokens, chunk_size_limit=150)
        synthesizer = get_response_synthesizer(
            llm=llm, prompt_helper=helper, response_mode=ResponseMode(mode), streaming=streaming, **kwargs
        )
        return RetrieverQueryEngine(FixedRetriever(TEXTS), synthesizer)

    return build


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("mode", ["tree_summarize", "refine"])
def test_the_same_answers_in_one_program(
    mode: str, asynchronous: bool, streaming: bool, chat: bool, build: Any, client: MacawClient
) -> None:
    engine = build(mode, streaming=streaming, chat=chat)
    expected = querying(engine, "What?", asynchronous=asynchronous)()
    before = {program.id for program in client.list_programs()}
    actual = querying(compile(engine), "What?", asynchronous=asynchronous)()
    assert (type(actual), str(actual)) == (type(expected), str(expected))
    [program] = [program for program in client.list_programs() if program.id not in before]
    assert program.metadata == {"engine": type(engine._response_synthesizer).__name__}
    assert {call.status for call in program.calls} == {"completed"}
    assert len(program.calls) > 3


def test_questions_share_their_chunks(build: Any, client: MacawClient) -> None:
    """Where a template has the context before the question, only the first question computes it."""
    before = {program.id for program in client.list_programs()}
    engine = compile(build("accumulate", text_qa_template=CONTEXT_FIRST))
    for question in ("What?", "Who?", "Where?", "When?"):
        engine.query(question)
    programs = [program for program in client.list_programs() if program.id not in before]
    assert len(programs) == 4
    prompts = sum(program.totals.prompt_tokens for program in programs)
    assert sum(program.totals.cached_tokens for program in programs) / prompts > 0.65


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_an_abandoned_stream_stops_the_engine(asynchronous: bool, build: Any, client: MacawClient) -> None:
    before = {program.id for program in client.list_programs()}
    engine = compile(build("generation", streaming=True, max_tokens=1900))

    async def begin() -> None:
        response = await engine.aquery("Tell all.")
        await anext(response.response_gen)
        await response.response_gen.aclose()

    if asynchronous:
        run_async(begin())
    else:
        response = engine.query("Tell all.")
        next(response.response_gen)
        response.response_gen.close()
    deadline = time.monotonic() + 30
    while True:
        [program] = [program for program in client.list_programs() if program.id not in before]
        if program.status != "running":
            break
        assert time.monotonic() < deadline
    assert program.error is not None
    assert program.error.code == "cancelled"


def test_an_error_of_the_engine(build: Any) -> None:
    """The program is refused as a whole; what the call then raises is its own."""
    engine = build("generation")
    with pytest.raises(openai.BadRequestError, match="2,048") as plain:
        engine.query("nuts " * 3000)
    with pytest.raises(openai.BadRequestError) as compiled:
        compile(engine).query("nuts " * 3000)
    assert str(compiled.value) == str(plain.value)
