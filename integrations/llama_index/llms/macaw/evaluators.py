"""`BatchEvalRunner`: what its evaluators ask of all responses, sent as one program.

An evaluator by itself makes one call, or a few on a context that does not fit into a prompt: a batch is what pays.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llama_index.core import Settings
from llama_index.core.evaluation import (
    AnswerRelevancyEvaluator,
    BaseEvaluator,
    BatchEvalRunner,
    ContextRelevancyEvaluator,
    CorrectnessEvaluator,
    FaithfulnessEvaluator,
    GuidelineEvaluator,
    PairwiseComparisonEvaluator,
    RelevancyEvaluator,
)
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.response_synthesizers import CompactAndRefine, get_response_synthesizer

from llama_index.llms.macaw.base import Macaw
from llama_index.llms.macaw.fanout import Unit, answered, lower_units
from llama_index.llms.macaw.lowering import Lowering, NotStatic
from llama_index.llms.macaw.packing import planning, remembering
from llama_index.llms.macaw.running import Lowered
from llama_index.llms.macaw.synthesizers import LOWERINGS as SYNTHESIZERS

logger = logging.getLogger(__name__)

METHODS = ("aevaluate_response_strs", "aevaluate_responses")
"""Of a runner: all its others end in one of these."""


def why_not(runner: BatchEvalRunner) -> str | None:
    """Why a runner cannot be compiled; None if it can."""
    if type(runner) is not BatchEvalRunner:
        return f"{type(runner).__name__} is a subclass of BatchEvalRunner"
    reasons = [f"{name}: {reason}" for name, e in runner.evaluators.items() if (reason := _why_not(e))]
    return "; ".join(reasons) if len(reasons) == len(runner.evaluators) else None


def compile_runner(runner: BatchEvalRunner) -> BatchEvalRunner:
    """A compiled copy."""
    compiled = copy.copy(runner)
    compiled.semaphore = asyncio.Semaphore(runner.workers)  # one that was waited for belongs to its loop
    for name in METHODS:
        vars(compiled)[name] = functools.partial(_run, name, compiled)
    return compiled


async def aevaluate(native: Callable[..., Any], runner: BatchEvalRunner, *args: Any, **kwargs: Any) -> Any:
    """``await native(runner, ...)``, which is one of `METHODS`, answered from a program."""
    plans = _lower(native.__name__, runner, *args, **kwargs)
    return await answered(runner, plans, functools.partial(native, runner, *args, **kwargs))


async def _run(name: str, runner: BatchEvalRunner, *args: Any, **kwargs: Any) -> Any:
    return await aevaluate(getattr(BatchEvalRunner, name), runner, *args, **kwargs)


def _why_not(evaluator: BaseEvaluator) -> str | None:
    if type(evaluator) not in LOWERINGS:
        return f"{type(evaluator).__name__} is not one of {', '.join(kind.__name__ for kind in LOWERINGS)}"
    llm: Any = evaluator._llm  # type: ignore[attr-defined]
    if not isinstance(llm, Macaw):
        return f"its LLM is a {type(llm).__name__}, not Macaw"
    return "it has an output parser" if llm.output_parser else None


def _lower(method: str, runner: BatchEvalRunner, *args: Any, **kwargs: Any) -> list[Lowered]:
    """The calls that a method of the runner is about to make."""
    try:
        with planning():
            return lower_units("BatchEvalRunner", _units(_ARGUMENTS[method](runner, *args, **kwargs)))
    except Exception as error:  # native code meets the same, and there it is the user's to see
        logger.debug("%s could not be lowered: %r", method, error)
        return []


_Asked = tuple[str, BaseEvaluator, dict[str, Any]]
"""The name of an evaluator, itself, and what it is given."""


def _of_strings(
    runner: BatchEvalRunner,
    queries: list[str] | None = None,
    response_strs: list[str] | None = None,
    contexts_list: list[list[str]] | None = None,
    **lists: Any,
) -> Iterator[_Asked]:
    cleaned = runner._validate_and_clean_inputs(queries, response_strs, contexts_list)
    for name, evaluator, i, more in _each(runner, len(cleaned[0]), lists):
        query, response, contexts = (values[i] for values in cleaned)
        yield name, evaluator, {"query": query, "response": response, "contexts": contexts, **more}


def _of_responses(
    runner: BatchEvalRunner, queries: list[str] | None = None, responses: list[Any] | None = None, **lists: Any
) -> Iterator[_Asked]:
    cleaned = runner._validate_and_clean_inputs(queries, responses)
    for name, evaluator, i, more in _each(runner, len(cleaned[0]), lists):
        query, response = (values[i] for values in cleaned)
        contexts = None if response is None else [node.get_content() for node in response.source_nodes]
        text = None if response is None else response.response
        yield name, evaluator, {"query": query, "response": text, "contexts": contexts, **more}


_ARGUMENTS: dict[str, Callable[..., Iterator[_Asked]]] = dict(zip(METHODS, (_of_strings, _of_responses), strict=True))


def _each(
    runner: BatchEvalRunner, number: int, lists: dict[str, Any]
) -> Iterator[tuple[str, BaseEvaluator, int, dict[str, Any]]]:
    """Every evaluator on every item; `lists` are more arguments, of all evaluators, or by an evaluator's name."""
    by_evaluator = isinstance(next(iter(lists.values()), None), dict)
    for i in range(number):
        for name, evaluator in runner.evaluators.items():
            own = lists.get(name, {}) if by_evaluator else lists
            yield f"{name}-{i}", evaluator, i, {key: values[i] for key, values in own.items()}


def _units(asked: Iterator[_Asked]) -> Iterator[Unit]:
    for name, evaluator, given in asked:
        if _why_not(evaluator) is None:
            yield functools.partial(_evaluate, name, evaluator, given)


def _evaluate(name: str, evaluator: BaseEvaluator, given: dict[str, Any], lowering: Lowering) -> None:
    """The calls of one evaluator on one response."""
    lowering.prefix = f"{name}/"
    LOWERINGS[type(evaluator)](lowering, evaluator, **given)


def _needs(*values: Any) -> None:
    if any(value is None for value in values):
        raise NotStatic("An evaluator that is not given what it needs raises an error.")


def _correctness(lowering: Lowering, e: Any, query: Any, response: Any, reference: Any = None, **_: Any) -> None:
    _needs(query, response)
    reference = reference or "(NO REFERENCE ANSWER SUPPLIED)"
    args = {"query": query, "generated_answer": response, "reference_answer": reference}
    lowering.predict(e._llm, e._eval_template, "score", **args)


def _answer_relevancy(lowering: Lowering, e: Any, query: Any, response: Any, **_: Any) -> None:
    _needs(query, response)
    lowering.predict(e._llm, e._eval_template, "score", query=query, response=response)


def _guideline(lowering: Lowering, e: Any, query: Any, response: Any, **_: Any) -> None:
    _needs(query, response)
    lowering.predict(e._llm, e._eval_template, "score", query=query, response=response, guidelines=e._guidelines)


def _pairwise(
    lowering: Lowering,
    e: Any,
    query: Any,
    response: Any,
    second_response: Any = None,
    reference: Any = None,
    **_: Any,
) -> None:
    """Both orders at once: the second one is asked for unless the first answer cannot be parsed."""
    _needs(query, response, second_response)
    orders = [(response, second_response), (second_response, response)]
    for name, (first, second) in zip(("score", "flipped"), orders[: 2 if e._enforce_consensus else 1], strict=False):
        args = {"query": query, "answer_1": first, "answer_2": second, "reference": reference or ""}
        lowering.predict(e._llm, e._eval_template, name, **args)


def _faithfulness(lowering: Lowering, e: Any, response: Any, contexts: Any, **_: Any) -> None:
    _needs(response, contexts)
    _over_contexts(lowering, e, response, contexts)


def _relevancy(lowering: Lowering, e: Any, query: Any, response: Any, contexts: Any, **_: Any) -> None:
    _needs(query, response, contexts)
    _over_contexts(lowering, e, f"Question: {query}\nResponse: {response}", contexts)


def _context_relevancy(lowering: Lowering, e: Any, query: Any, contexts: Any, **_: Any) -> None:
    _needs(query, contexts)
    _over_contexts(lowering, e, query, contexts)


def _over_contexts(lowering: Lowering, e: Any, question: str, contexts: Sequence[str]) -> None:
    """What the query engine of a `SummaryIndex` over the contexts asks for: one call, if they fit into a prompt."""
    splitter, *more = Settings.transformations
    if more or type(splitter) is not SentenceSplitter:
        raise NotStatic("Contexts are split by something else than a SentenceSplitter.")
    size = splitter.chunk_size
    # Not by `split_text`, which opens a span.
    chunks = [chunk for text in contexts for chunk in splitter._merge(splitter._split(text, size), size)]
    synthesizer = get_response_synthesizer(
        llm=e._llm, text_qa_template=e._eval_template, refine_template=e._refine_template
    )
    synthesizer._prompt_helper = remembering(synthesizer._prompt_helper)
    if chunks:
        SYNTHESIZERS[CompactAndRefine](lowering, synthesizer, question, chunks, {})


LOWERINGS: dict[type[BaseEvaluator], Callable[..., None]] = {
    FaithfulnessEvaluator: _faithfulness,
    RelevancyEvaluator: _relevancy,
    ContextRelevancyEvaluator: _context_relevancy,
    CorrectnessEvaluator: _correctness,
    AnswerRelevancyEvaluator: _answer_relevancy,
    GuidelineEvaluator: _guideline,
    PairwiseComparisonEvaluator: _pairwise,
}
