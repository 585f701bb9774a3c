"""`BatchEvalRunner` compiled against plain: the same results and everything else, and one program for all of them."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import openai
import pytest
from llama_index.core import Settings
from llama_index.core.base.response.schema import Response
from llama_index.core.evaluation import (
    AnswerRelevancyEvaluator,
    BaseEvaluator,
    BatchEvalRunner,
    ContextRelevancyEvaluator,
    CorrectnessEvaluator,
    EvaluationResult,
    FaithfulnessEvaluator,
    GuidelineEvaluator,
    PairwiseComparisonEvaluator,
    RelevancyEvaluator,
    batch_runner,
)
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import TreeSummarize
from llama_index.core.schema import NodeWithScore, TextNode

from llama_index.llms.macaw import Macaw, autocompile, compile
from llama_index.llms.macaw.compile import warn_once
from llama_index.llms.macaw.refine import HAS_ONE_LOOP
from llama_index_macaw.observing import Bench, FixedRetriever, Observed, run_async
from macaw.errors import ContextLengthError
from scripted_macaw_server import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:asyncio_module:DeprecationWarning")  # LlamaIndex's own

KINDS: dict[str, Callable[[Macaw], BaseEvaluator]] = {
    "faithfulness": lambda llm: FaithfulnessEvaluator(llm=llm),
    "relevancy": lambda llm: RelevancyEvaluator(llm=llm),
    "context relevancy": lambda llm: ContextRelevancyEvaluator(llm=llm),
    "correctness": lambda llm: CorrectnessEvaluator(llm=llm),
    "answer relevancy": lambda llm: AnswerRelevancyEvaluator(llm=llm),
    "guideline": lambda llm: GuidelineEvaluator(llm=llm),
    "pairwise": lambda llm: PairwiseComparisonEvaluator(llm=llm),
}
QUERIES = ["What does it eat?", "Where does it live?", "How old is it?"]
RESPONSES = [
    Response(f"It is {i}.", [NodeWithScore(node=TextNode(text=f"The macaw is {i}. " * 4, id_=f"{i}"))] * 2)
    for i in range(3)
]
STRINGS = {
    "queries": QUERIES,
    "response_strs": [response.response for response in RESPONSES],
    "contexts_list": [[node.get_content() for node in response.source_nodes] for response in RESPONSES],
}
MORE = {"second_response": ["It is old.", "It is young.", "It is tall."], "reference": ["1", "2", "3"]}


def grade(prompt: str) -> str | None:
    """What evaluators can read."""
    answers = {
        "[The Start of Assistant A": "[[C]]",
        "## Generated Answer": "4.0\nAs good as the reference.",
        "Guidelines:": '{"passing": true, "feedback": "good"}',
        "[RESULT]": "Good enough. [RESULT] 2",
    }
    return next((answer for part, answer in answers.items() if part in prompt), "YES")


@pytest.fixture(autouse=True)
def _tracing(bench: Bench) -> Any:
    """What evaluators make themselves takes its callback manager from the settings."""
    before = Settings._callback_manager
    Settings.callback_manager = bench.callback_manager
    yield
    Settings._callback_manager = before


@pytest.fixture
def bench(recorder: Recorder) -> Bench:
    return Bench(recorder)


@pytest.fixture
def model(server_url: str, bench: Bench) -> Macaw:
    options = {"is_function_calling_model": False, "max_tokens": 64, "max_retries": 0, "context_window": 4000}
    return Macaw(model="m", api_base=server_url, is_chat_model=True, callback_manager=bench.callback_manager, **options)


@pytest.fixture(autouse=True)
def _do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is tried three times, seconds apart."""
    for worker in (batch_runner.eval_worker, batch_runner.eval_response_worker):
        monkeypatch.setattr(worker.retry, "sleep", _nothing)


async def _nothing(seconds: float) -> None:
    pass


def observe(bench: Bench, runner: BatchEvalRunner, script: Any = grade, **given: Any) -> Observed:
    """What a run gives, in any order: the workers overtake each other."""
    runner.semaphore = asyncio.Semaphore(runner.workers)  # it belongs to the first event loop that waits for it
    given = given or {**STRINGS, **MORE}
    method = runner.aevaluate_responses if "responses" in given else runner.aevaluate_response_strs
    return bench.observe(lambda: str(run_async(method(**given))), script=script).in_any_order()


@pytest.mark.parametrize("of", ["strings", "responses"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_program_and_everything_else_as_before(
    kind: str, of: str, model: Macaw, bench: Bench, recorder: Recorder
) -> None:
    given: dict[str, Any] = STRINGS if of == "strings" else {"queries": QUERIES, "responses": RESPONSES}
    runner = BatchEvalRunner({"e": KINDS[kind](model)}, workers=2)
    expected = observe(bench, runner, **given, **MORE)
    assert expected.error is None
    assert recorder.requests == {"chat": 6 if kind == "pairwise" else 3}
    assert observe(bench, compile(runner), **given, **MORE) == expected
    assert recorder.requests == {"program": 1}


def test_all_evaluators_of_all_responses_at_once(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    runner = BatchEvalRunner({kind: build(model) for kind, build in KINDS.items()}, workers=2)
    expected = observe(bench, runner)
    assert recorder.peak <= 2
    assert observe(bench, compile(runner)) == expected
    assert (recorder.requests, recorder.peak) == ({"program": 1}, 3 * (len(KINDS) + 1))


def test_arguments_by_evaluator(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    runner = BatchEvalRunner({kind: KINDS[kind](model) for kind in ("correctness", "pairwise", "faithfulness")})
    given = {**STRINGS, "correctness": {"reference": ["1", "2", "3"]}, "pairwise": MORE}
    expected = observe(bench, runner, **given)
    assert expected.error is None
    assert observe(bench, compile(runner), **given) == expected
    assert recorder.requests == {"program": 1}


@pytest.mark.skipif(not HAS_ONE_LOOP, reason="CompactAndRefine of this llama-index-core leaves no room for an answer")
def test_contexts_that_do_not_fit_into_a_prompt(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    contexts = [["The macaw eats nuts. " * 500, "It flies. " * 600], ["It is small."], ["It sleeps. " * 1500]]
    runner = BatchEvalRunner({"e": FaithfulnessEvaluator(llm=model.model_copy(update={"context_window": 2000}))})
    expected = observe(bench, runner, **{**STRINGS, "contexts_list": contexts})
    assert recorder.requests["chat"] > 3
    assert observe(bench, compile(runner), **{**STRINGS, "contexts_list": contexts}) == expected
    assert recorder.requests == {"program": 1}


def test_an_answer_that_cannot_be_parsed(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    """The second order is then not asked for; the server has begun with it."""
    runner = BatchEvalRunner({"e": PairwiseComparisonEvaluator(llm=model)})

    def script(prompt: str) -> str:
        return "Neither." if "It is 2." in prompt else "[[C]]"

    expected = observe(bench, runner, script)
    actual = observe(bench, compile(runner), script)
    actual.prompts &= expected.prompts
    assert actual == expected
    assert recorder.requests == {"program": 1}


def test_an_error(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    """What is tried again are ordinary requests."""
    runner = BatchEvalRunner({"e": CorrectnessEvaluator(llm=model)}, workers=1)

    def fail(prompt: str) -> str | None:
        if "It is 1." in prompt:
            raise ContextLengthError("Context of 12 tokens is over the model's 10. Shorten the prompt.")
        return grade(prompt)

    expected = observe(bench, runner, fail)
    actual = observe(bench, compile(runner), fail)
    assert issubclass(expected.error[0], openai.BadRequestError)
    assert actual.error == expected.error
    assert recorder.requests == {"program": 1, "chat": 2}


@pytest.mark.parametrize("given", [{}, {"queries": QUERIES}, {"queries": QUERIES, "response_strs": ["one"]}])
def test_what_is_not_given(given: dict[str, Any], model: Macaw, bench: Bench, recorder: Recorder) -> None:

    def run(change: Callable[[Any], Any]) -> Observed:
        runner = change(BatchEvalRunner({"e": CorrectnessEvaluator(llm=model)}))
        return bench.observe(lambda: str(run_async(runner.aevaluate_response_strs(**given)))).in_any_order()

    expected = run(lambda runner: runner)
    assert expected.error[0] is ValueError
    assert run(compile) == expected
    assert not recorder.requests


def test_another_splitter(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    """What it makes of the contexts is not known ahead."""
    runner = BatchEvalRunner({"f": FaithfulnessEvaluator(llm=model), "c": CorrectnessEvaluator(llm=model)})
    before = Settings._transformations, Settings._node_parser
    Settings.transformations = [TokenTextSplitter()]
    try:
        expected = observe(bench, runner)
        assert observe(bench, compile(runner)) == expected
    finally:
        Settings._transformations, Settings._node_parser = before
    assert recorder.requests == {"program": 1, "chat": 3}


def test_of_queries(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    """The engine answers first, with a program for each query if it is compiled."""
    engine = RetrieverQueryEngine(FixedRetriever(["The macaw is old."]), TreeSummarize(llm=model))
    runner = BatchEvalRunner({kind: KINDS[kind](model) for kind in ("faithfulness", "relevancy")})

    def run(runner: BatchEvalRunner, engine: Any) -> Observed:
        return bench.observe(lambda: str(runner.evaluate_queries(engine, QUERIES)), script=grade).in_any_order()

    expected = run(runner, engine)
    assert expected.error is None
    assert run(compile(runner), compile(engine)) == expected
    assert recorder.requests == {"program": 3 + 1}


def test_autocompile(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    """The synthesizers inside of evaluators are answered from the program of the batch."""
    runner = BatchEvalRunner({kind: build(model) for kind, build in KINDS.items()})
    expected = observe(bench, runner)
    autocompile()
    try:
        assert observe(bench, runner) == expected
        assert recorder.requests == {"program": 1}
        assert observe(bench, compile(runner)) == expected
        assert recorder.requests == {"program": 1}
    finally:
        autocompile(False)
    observe(bench, runner)
    assert not recorder.requests["program"]


class OwnEvaluator(BaseEvaluator):
    def _get_prompts(self) -> Any:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        pass

    async def aevaluate(self, query: Any = None, *args: Any, **kwargs: Any) -> EvaluationResult:
        return EvaluationResult(query=query, passing=True)


class OwnRunner(BatchEvalRunner):
    pass


def test_what_is_not_compiled(model: Macaw, bench: Bench, recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    own = BatchEvalRunner({"own": OwnEvaluator()})
    assert compile(own) is own
    assert "own: OwnEvaluator is not one of FaithfulnessEvaluator," in caplog.text
    subclass = OwnRunner({"e": CorrectnessEvaluator(llm=model)})
    assert compile(subclass) is subclass
    alone = CorrectnessEvaluator(llm=model)
    assert compile(alone) is alone
    assert "CorrectnessEvaluator makes" in caplog.text
    both = BatchEvalRunner({"own": OwnEvaluator(), "e": CorrectnessEvaluator(llm=model)})
    expected = observe(bench, both)
    assert observe(bench, compile(both)) == expected
    assert recorder.requests == {"program": 1}


def test_copies(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    runner = BatchEvalRunner({"e": CorrectnessEvaluator(llm=model)})
    compiled = compile(runner)
    assert compile(compiled) is compiled
    expected = observe(bench, runner)
    assert not recorder.requests["program"]
    assert observe(bench, copy.copy(compiled)) == expected
    assert recorder.requests == {"program": 1}
