"""`compile` and `autocompile` on whole engines, and what they leave as it is."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.indices.query.query_transform.base import StepDecomposeQueryTransform
from llama_index.core.query_engine import (
    MultiStepQueryEngine,
    RetrieverQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
)
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.response_synthesizers import (
    CompactAndRefine,
    ResponseMode,
    TreeSummarize,
    get_response_synthesizer,
)
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.core.selectors import LLMMultiSelector
from llama_index.core.tools import QueryEngineTool
from llama_index.core.types import BaseOutputParser
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

import llama_index.llms.macaw
from llama_index.llms.macaw import Macaw, autocompile, compile
from llama_index.llms.macaw.compile import warn_once
from llama_index_macaw.observing import Bench, FixedRetriever, querying
from scripted_macaw_server import Recorder

TEXTS = [f"Part {i}. " + f"The macaw number {i} flies and eats nuts. " * 14 for i in range(4)]
TOOLS = {"birds": "On birds.", "trees": "On trees."}


@pytest.fixture
def bench(recorder: Recorder) -> Bench:
    return Bench(recorder)


@pytest.fixture
def model(server_url: str, bench: Bench) -> Macaw:
    return Macaw(
        model="m",
        api_base=server_url,
        is_chat_model=True,
        is_function_calling_model=False,
        context_window=1000,
        max_tokens=64,
        max_retries=0,
        callback_manager=bench.callback_manager,
    )


@pytest.fixture
def engine(model: Macaw, bench: Bench) -> Callable[..., RetrieverQueryEngine]:
    def build(mode: str = "tree_summarize", **kwargs: Any) -> RetrieverQueryEngine:
        synthesizer = get_response_synthesizer(
            llm=model, response_mode=ResponseMode(mode), callback_manager=bench.callback_manager, **kwargs
        )
        retriever = FixedRetriever(TEXTS, bench.callback_manager)
        return RetrieverQueryEngine(retriever, synthesizer, callback_manager=bench.callback_manager)

    return build


@pytest.fixture
def tools(engine: Any) -> list[QueryEngineTool]:
    return [
        QueryEngineTool.from_defaults(engine("tree_summarize"), name=name, description=text)
        for name, text in TOOLS.items()
    ]


def test_exports() -> None:
    assert llama_index.llms.macaw.__all__ == ["Macaw", "autocompile", "compile"]


def sub_questions(model: Macaw, tools: list[QueryEngineTool]) -> Any:
    return SubQuestionQueryEngine(
        LLMQuestionGenerator.from_defaults(llm=model), TreeSummarize(llm=model), tools, verbose=False
    )


def router(model: Macaw, tools: list[QueryEngineTool]) -> Any:
    return RouterQueryEngine(LLMMultiSelector.from_defaults(llm=model), tools, llm=model)


def multi_step(model: Macaw, tools: list[QueryEngineTool]) -> Any:
    return MultiStepQueryEngine(
        tools[0].query_engine,
        StepDecomposeQueryTransform(llm=model),
        response_synthesizer=TreeSummarize(llm=model),
        index_summary="birds",
        num_steps=2,
    )


def decide(prompt: str) -> str | None:
    """What the engines' own calls need to get."""
    if "sub_question" in prompt:
        items = [{"sub_question": f"What of {name}?", "tool_name": name} for name in TOOLS]
        return json.dumps({"items": items})
    if "choices" in prompt:
        return json.dumps([{"choice": 1, "reason": "birds"}, {"choice": 2, "reason": "trees"}])
    return None


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("build", "programs", "chats"), [(sub_questions, 3, 1), (router, 3, 1), (multi_step, 3, 2)])
def test_engines_of_engines(
    build: Any,
    programs: int,
    chats: int,
    asynchronous: bool,
    model: Macaw,
    tools: list[QueryEngineTool],
    bench: Bench,
    recorder: Recorder,
) -> None:
    """What decides is an ordinary request; each synthesis is a program."""
    engine = build(model, tools)
    expected = bench.observe(querying(engine, "What?", asynchronous=asynchronous), script=decide)
    assert expected.error is None
    actual = bench.observe(querying(compile(engine), "What?", asynchronous=asynchronous), script=decide)
    if asynchronous:
        expected, actual = expected.in_any_order(), actual.in_any_order()
    assert actual == expected
    assert recorder.requests == {"program": programs, "chat": chats}


@pytest.mark.parametrize("mode", ["tree_summarize", "accumulate", "compact_accumulate", "generation"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_autocompile_and_back(mode: str, asynchronous: bool, engine: Any, bench: Bench, recorder: Recorder) -> None:
    natives = (TreeSummarize.__dict__["get_response"], CompactAndRefine.__dict__["aget_response"])
    queried = querying(engine(mode), "What?", asynchronous=asynchronous)
    expected = bench.observe(queried)
    plain = recorder.requests.copy()
    autocompile()
    autocompile()
    try:
        actual = bench.observe(queried)
        assert recorder.requests == {"program": 1}
        bench.observe(querying(compile(engine(mode)), "What?", asynchronous=asynchronous))
        assert recorder.requests == {"program": 1}
    finally:
        autocompile(False)
    if asynchronous:
        expected, actual = expected.in_any_order(), actual.in_any_order()
    assert actual == expected
    bench.observe(queried)
    assert recorder.requests == plain
    assert natives == (TreeSummarize.__dict__["get_response"], CompactAndRefine.__dict__["aget_response"])


class Answer(BaseModel):
    text: str


class OwnSynthesizer(TreeSummarize):
    pass


class Parser(BaseOutputParser):
    def parse(self, output: str) -> Any:
        return output


REFUSED: dict[str, tuple[Callable[[Macaw], Any], str]] = {
    "output_cls": (lambda llm: CompactAndRefine(llm=llm, output_cls=Answer), "it has an output_cls"),
    "filtering": (
        lambda llm: CompactAndRefine(llm=llm, structured_answer_filtering=True),
        "it filters structured answers",
    ),
    "parser": (
        lambda llm: TreeSummarize(llm=llm.model_copy(update={"output_parser": Parser()})),
        "it has an output parser",
    ),
    "subclass": (lambda llm: OwnSynthesizer(llm=llm), "OwnSynthesizer is not one of TreeSummarize,"),
    "no calls": (lambda llm: NoText(llm=llm), "NoText is not one of TreeSummarize,"),
    "another model": (
        lambda llm: TreeSummarize(llm=OpenAILike(model="m", api_base=llm.api_base)),
        "its LLM is a OpenAILike, not Macaw",
    ),
    "another object": (
        lambda llm: llm,
        "Macaw is no synthesizer, extractor or BatchEvalRunner, nor one of RetrieverQueryEngine,",
    ),
    "engine of a refused one": (
        lambda llm: RetrieverQueryEngine(FixedRetriever(TEXTS), NoText(llm=llm)),
        "NoText: NoText is not one of",
    ),
}


if "multimodal" in inspect.signature(TreeSummarize).parameters:  # since 0.14
    REFUSED["multimodal"] = (lambda llm: TreeSummarize(llm=llm, multimodal=True), "it is multimodal")


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_compiled_stays_and_is_told_once(case: str, model: Macaw, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    build, reason = REFUSED[case]
    x = build(model)
    assert compile(x) is x
    assert compile(x) is x
    assert [reason in record.message for record in caplog.records] == [True]


def test_compiling_twice(engine: Any) -> None:
    compiled = compile(engine())
    assert compile(compiled) is compiled
    assert compile(compiled._response_synthesizer) is compiled._response_synthesizer


def test_the_original_stays(engine: Any, recorder: Recorder) -> None:
    original = engine()
    compiled = compile(original)
    assert type(compiled) is type(original)
    assert compiled.retriever is original.retriever
    original.query("What?")
    assert not recorder.requests["program"]


def test_a_copy_is_compiled_too(engine: Any, recorder: Recorder) -> None:
    compiled = compile(engine())
    answer = str(compiled.query("What?"))
    again = copy.deepcopy(compiled._response_synthesizer)
    assert again.get_response.args[0] is again
    assert again.get_response("What?", TEXTS) == answer
    assert recorder.requests == {"program": 2}
