"""Compiled against plain: nobody can tell the two apart, but by the requests that are sent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import openai
import pytest
from llama_index.core import PromptTemplate
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer

from llama_index.llms.macaw import Macaw, autocompile, compile
from llama_index.llms.macaw.refine import HAS_ONE_LOOP
from llama_index.llms.macaw.running import CURRENT_RUN, MAX_REPLANS
from llama_index_macaw.observing import Bench, FixedRetriever, querying, run_async
from macaw.errors import ContextLengthError, EngineFailedError
from scripted_macaw_server import Recorder

REFINES = ["refine", "compact"] if HAS_ONE_LOOP else ["refine"]
MODES = [
    *REFINES,
    "simple_summarize",
    "tree_summarize",
    "generation",
    "accumulate",
    "compact_accumulate",
]
TEXTS = [f"Part {i} of the story. " + f"The macaw number {i} flies and eats nuts. " * 14 for i in range(6)]
QUESTION = "What does it eat?"

Script = Callable[[str], str | None]

ANSWERS: dict[str, Script] = {
    "another level of the tree": lambda prompt: "the " * 60,
    "longer than a prompt": lambda prompt: "nuts " * 1700 if "Part 0" in prompt else None,
    "an empty one": lambda prompt: "" if "Part 2" in prompt else None,
    "only empty ones": lambda prompt: "",
    "white space": lambda prompt: " \n " if "Part 2" in prompt else None,
    "white space around": lambda prompt: "\n\n nuts and fruit \n",
}
NEARLY_A_PROMPT = "nuts-" * 850  # as a summary it would make trees grow


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

    def build(
        mode: str, *, chat: bool = True, streaming: bool = False, size: int = 200, max_retries: int = 0, **kwargs: Any
    ) -> Any:
        llm = Macaw(
            model="m",
            api_base=server_url,
            is_chat_model=chat,
            is_function_calling_model=False,
            context_window=2000,
            max_tokens=64,
            max_retries=max_retries,
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
    assert actual == expected
    if "accumulate" in mode and streaming:
        assert expected.error == (ValueError, "Unable to stream in Accumulate response mode")
        assert not recorder.requests
    else:
        assert (expected.prompts.total() == 1) == (mode in ("simple_summarize", "generation"))
        assert recorder.requests == {"program": 1}


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("mode", "answers"),
    [*product([*REFINES, "tree_summarize"], ANSWERS), *product(REFINES, ["nearly as long as a prompt"])],
)
def test_answers_that_change_what_comes_next(
    mode: str, answers: str, asynchronous: bool, streaming: bool, chat: bool, build: Any, bench: Bench
) -> None:
    script = ANSWERS.get(answers, lambda prompt: NEARLY_A_PROMPT)
    engine = build(mode, chat=chat, streaming=streaming)
    expected = bench.observe(querying(engine, QUESTION, asynchronous=asynchronous), script=script)
    actual = bench.observe(querying(compile(engine), QUESTION, asynchronous=asynchronous), script=script)
    if asynchronous:
        expected, actual = expected.in_any_order(), actual.in_any_order()
    actual.prompts &= expected.prompts  # the server has begun with what turned out not to be needed
    assert actual == expected


def test_another_level_is_another_program(build: Any, recorder: Recorder) -> None:
    recorder.script = ANSWERS["another level of the tree"]
    compile(build("tree_summarize")).query(QUESTION)
    assert recorder.requests == {"program": 2}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("part", range(6))
def test_a_wrong_chain_is_planned_again(part: int, asynchronous: bool, build: Any, recorder: Recorder) -> None:
    """All behind an answer that is empty, which LlamaIndex passes over; but a last call by itself needs no plan."""
    passed_over = "Empty Response" if part == 0 and not HAS_ONE_LOOP else ""
    recorder.script = lambda prompt: "" if f"Part {part} of" in prompt else None
    querying(compile(build("refine")), QUESTION, asynchronous=asynchronous)()
    first, *again = recorder.programs
    assert len(first.calls) == 6
    if part == 5 or (part > 0 and not HAS_ONE_LOOP):  # an older core takes it as an answer
        assert recorder.requests == {"program": 1}
    elif part == 4:
        assert recorder.requests == {"program": 1, "chat": 1}
    else:
        assert recorder.requests == {"program": 2}
        assert [len(call.inputs) for call in again[0].calls] == [0] + [1] * (4 - part)
        assert f"Part {part + 1} of" in str(again[0].calls[0].request)
        assert passed_over in str(again[0].calls[0].request)


def test_a_chain_is_planned_again_three_times(build: Any, recorder: Recorder) -> None:
    """And no more, where every answer splits the chunk behind it."""
    recorder.script = lambda prompt: NEARLY_A_PROMPT
    compile(build("refine")).query(QUESTION)
    assert [len(program.calls) for program in recorder.programs] == [6, 6, 5, 4]
    assert recorder.requests == {"program": 1 + MAX_REPLANS, "chat": 4}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_autocompile_plans_again(asynchronous: bool, build: Any, bench: Bench, recorder: Recorder) -> None:
    queried = querying(build("refine"), QUESTION, asynchronous=asynchronous)
    expected = bench.observe(queried, script=ANSWERS["longer than a prompt"])
    autocompile()
    try:
        actual = bench.observe(queried, script=ANSWERS["longer than a prompt"])
    finally:
        autocompile(False)
    assert recorder.requests == {"program": 2}
    if asynchronous:
        expected, actual = expected.in_any_order(), actual.in_any_order()
    actual.prompts &= expected.prompts
    assert actual == expected


def test_what_is_asked_again_is_planned_again(build: Any, bench: Bench, recorder: Recorder) -> None:
    """`openai`'s client repeats what failed; behind it everything is planned."""

    def flaky() -> Script:
        tried = []

        def answer(prompt: str) -> str | None:
            if "Part 2" in prompt and not tried:
                tried.append(prompt)
                raise EngineFailedError("The engine died.")
            return None

        return answer

    engine = build("refine", max_retries=1)
    expected = bench.observe(querying(engine, QUESTION, asynchronous=False), script=flaky())
    assert expected.error is None
    assert bench.observe(querying(compile(engine), QUESTION, asynchronous=False), script=flaky()) == expected
    assert recorder.requests == {"program": 2}
    assert [len(program.calls) for program in recorder.programs] == [6, 4]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_an_error_in_what_was_planned_again(
    asynchronous: bool, streaming: bool, build: Any, bench: Bench, recorder: Recorder
) -> None:
    def script(prompt: str) -> str | None:
        if "Part 4" in prompt:
            raise ContextLengthError("Context of 12 tokens is over the model's 10. Shorten the prompt.")
        return "" if "Part 0" in prompt else None

    engine = build("refine", streaming=streaming)
    expected = bench.observe(querying(engine, QUESTION, asynchronous=asynchronous), script=script)
    actual = bench.observe(querying(compile(engine), QUESTION, asynchronous=asynchronous), script=script)
    assert issubclass(expected.error[0], openai.BadRequestError)
    if not streaming:  # in a stream, an empty answer is refined as any other
        assert recorder.requests == {"program": 2}
    if asynchronous:
        expected, actual = expected.in_any_order(), actual.in_any_order()
    actual.prompts &= expected.prompts
    assert actual == expected


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("mode", MODES)
def test_errors_are_those_of_the_call(
    mode: str, asynchronous: bool, streaming: bool, build: Any, bench: Bench, recorder: Recorder
) -> None:
    def fail(prompt: str) -> str | None:
        if QUESTION in prompt and ("Part 3" in prompt or mode in ("generation", "simple_summarize")):
            raise ContextLengthError("Context of 12 tokens is over the model's 10. Shorten the prompt.")
        return None

    engine = build(mode, streaming=streaming)
    expected = bench.observe(querying(engine, QUESTION, asynchronous=asynchronous), script=fail)
    actual = bench.observe(querying(compile(engine), QUESTION, asynchronous=asynchronous), script=fail)
    if "accumulate" not in mode or not streaming:
        assert issubclass(expected.error[0], openai.BadRequestError)
        assert recorder.requests == {"program": 1}
    assert actual.error == expected.error
    assert actual.result is None
    if not asynchronous:  # where branches go on in the background, what is seen of them is a matter of chance
        assert (actual.events, actual.spans, actual.callbacks) == (expected.events, expected.spans, expected.callbacks)


def test_all_leaves_at_once(build: Any, recorder: Recorder) -> None:
    engine = build("tree_summarize", size=400)
    engine.retriever.texts = (TEXTS * 6)[:35]
    engine.query(QUESTION)
    leaves = recorder.requests["chat"] - 1
    assert leaves == (16 if HAS_ONE_LOOP else 3)  # an older prompt helper does not heed its limit
    assert recorder.peak == 1
    recorder.clear()
    compile(engine).query(QUESTION)
    assert (recorder.requests, recorder.peak) == ({"program": 1}, leaves)


def test_prompts_can_be_read_and_changed(build: Any, bench: Bench, recorder: Recorder) -> None:
    plain, compiled = build(REFINES[-1]), compile(build(REFINES[-1]))
    assert compiled.get_prompts() == plain.get_prompts()
    shorter = {
        "response_synthesizer:text_qa_template": PromptTemplate("{context_str}\n{query_str}"),
        "response_synthesizer:refine_template": PromptTemplate("{context_msg}\n{existing_answer}\n{query_str}"),
    }
    for engine in (plain, compiled):
        engine.update_prompts(shorter)
    assert compiled.get_prompts() == plain.get_prompts()
    expected = bench.observe(querying(plain, QUESTION, asynchronous=False))
    assert bench.observe(querying(compiled, QUESTION, asynchronous=False)) == expected
    assert recorder.requests == {"program": 1}


def test_templates_that_look_at_answers(build: Any, bench: Bench, recorder: Recorder) -> None:
    """What a function makes of an answer is not known ahead; all before that is."""
    template = PromptTemplate(
        "{context_msg}\n{shouted}\n{query_str}",
        function_mappings={"shouted": lambda **kwargs: kwargs.get("existing_answer", "").upper()},
    )
    engine = build("refine", refine_template=template)
    expected = bench.observe(querying(engine, QUESTION, asynchronous=False))
    assert bench.observe(querying(compile(engine), QUESTION, asynchronous=False)) == expected
    assert recorder.requests == {"program": 1, "chat": 5}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("mode", ["tree_summarize", *REFINES])
def test_several_questions_at_once(mode: str, asynchronous: bool, build: Any, recorder: Recorder) -> None:
    questions = [f"Question {i}?" for i in range(4)]
    engine = build(mode)
    expected = [str(engine.query(question)) for question in questions]
    prompts = recorder.prompts.copy()
    recorder.clear()
    compiled = compile(engine)
    if asynchronous:

        async def ask() -> list[Any]:
            return await asyncio.gather(*map(compiled.aquery, questions))

        actual = run_async(ask())
    else:
        with ThreadPoolExecutor(4) as pool:
            actual = list(pool.map(compiled.query, questions))
    assert [str(response) for response in actual] == expected
    assert recorder.prompts == prompts
    assert recorder.requests == {"program": 4}


def test_a_server_without_programs(build: Any, recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    engine = build("tree_summarize")
    expected = str(engine.query(QUESTION))
    recorder.clear()
    recorder.down = True
    assert str(compile(engine).query(QUESTION)) == expected
    assert recorder.requests == {"program": 1, "chat": 7}
    assert "A program was lost: NotFoundError" in caplog.text


@pytest.mark.parametrize("end", ["dropped", "closed"])
def test_an_abandoned_stream_cancels_its_program(end: str, build: Any, recorder: Recorder) -> None:
    response = compile(build("generation", streaming=True)).query("HOLD")
    recorder.started.wait()
    assert not recorder.cancelled
    if end == "closed":
        response.response_gen.close()
    del response
    assert recorder.cancellation.wait(10)


@pytest.mark.parametrize("end", ["dropped", "closed"])
def test_an_abandoned_asynchronous_stream_cancels_its_program(end: str, build: Any, recorder: Recorder) -> None:
    async def abandon() -> None:
        response = await compile(build("generation", streaming=True)).aquery("HOLD")
        await asyncio.to_thread(recorder.started.wait)
        assert not recorder.cancelled
        if end == "closed":
            await response.response_gen.aclose()
        del response
        assert await asyncio.to_thread(recorder.cancellation.wait, 10)

    run_async(abandon())


def test_a_cancelled_query_cancels_its_program(build: Any, recorder: Recorder) -> None:
    async def cancel() -> None:
        query = asyncio.create_task(compile(build("generation")).aquery("HOLD"))
        await asyncio.to_thread(recorder.started.wait)
        query.cancel()
        with pytest.raises(asyncio.CancelledError):
            await query
        assert await asyncio.to_thread(recorder.cancellation.wait, 10)

    run_async(cancel())
