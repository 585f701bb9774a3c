"""`compile`: response synthesizers, query engines and what else makes calls, with their calls sent as one program.

Prefetch and replay: `get_response` of a compiled synthesizer reads ahead what it is about to ask for, sends that as
a program, and then runs LlamaIndex's own `get_response`, whose requests are answered from the program. What was not
foreseen is an ordinary request, so the prompts are always the same as without `compile`.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import AsyncGenerator, Callable, Generator
from importlib.util import find_spec
from typing import Any, TypeVar

from llama_index.core.evaluation import BaseEvaluator, BatchEvalRunner
from llama_index.core.extractors import BaseExtractor
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.query_engine import (
    CitationQueryEngine,
    MultiStepQueryEngine,
    RetrieverQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.response_synthesizers import BaseSynthesizer, Refine

from llama_index.llms.macaw import evaluators, extractors, synthesizers
from llama_index.llms.macaw.packing import remembering, splitting_once
from llama_index.llms.macaw.running import CURRENT_RUN, AsyncPlannedStream, Lowered, PlannedStream, Run

T = TypeVar("T")

HAS_PIPELINES = find_spec("llama_index.core.query_pipeline") is not None
"""`QueryPipeline` was removed in llama-index-core 0.13."""

logger = logging.getLogger(__name__)

_PARTS: dict[type[Any], tuple[str, ...]] = {
    RetrieverQueryEngine: ("_response_synthesizer",),
    CitationQueryEngine: ("_response_synthesizer",),
    SubQuestionQueryEngine: ("_response_synthesizer", "_query_engines"),
    RouterQueryEngine: ("_summarizer", "_query_engines"),
    MultiStepQueryEngine: ("_response_synthesizer", "_query_engine"),
    TransformQueryEngine: ("_query_engine",),
    IngestionPipeline: ("transformations",),
}
"""Where engines keep what can be compiled: a synthesizer, an extractor, an engine, or a list or dict of these."""


class _NotCompiled(Exception):  # noqa: N818  (a verdict, not an error of the user's)
    """Why an object stays as it is."""


def compile(x: T) -> T:
    """A copy of a synthesizer, query engine, extractor, `BatchEvalRunner` or pipeline that sends its calls as programs.

    It behaves as the original, with its callbacks, spans, events, streaming and errors; only the answers come from
    the program. Whatever an engine decides while it runs, it decides as before.

    Args:
        x: It is not changed. Its parts are shared, but for those that can be compiled, which are.

    Returns:
        The copy; `x` itself if nothing in it can be compiled, and the log says why, once.
    """
    try:
        compiled: T = _compile(x)
    except _NotCompiled as reason:
        warn_once(f"{type(x).__name__} runs as it is: {reason}.")
        return x
    return compiled


@functools.lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Log a warning that each call would repeat."""
    logger.warning(message)


def _compile(x: Any) -> Any:
    if isinstance(x, BaseSynthesizer):
        return _compile_synthesizer(x)
    if isinstance(x, BaseExtractor):
        return _compile_extractor(x)
    if isinstance(x, BatchEvalRunner):
        return _compile_runner(x)
    if isinstance(x, BaseEvaluator):
        raise _NotCompiled(
            f"{type(x).__name__} makes one call after the other; a BatchEvalRunner with it can be compiled"
        )
    if type(x) in _PARTS:
        return _compile_engine(x)
    if HAS_PIPELINES:
        from llama_index.llms.macaw import pipeline

        if isinstance(x, pipeline.CompiledPipeline):
            return x
        if type(x) is pipeline.QueryPipeline:
            return pipeline.compile_pipeline(x)
    kinds = ", ".join(kind.__name__ for kind in _PARTS)
    raise _NotCompiled(f"{type(x).__name__} is no synthesizer, extractor or BatchEvalRunner, nor one of {kinds}")


def _compile_synthesizer(x: BaseSynthesizer) -> BaseSynthesizer:
    if "get_response" in vars(x):
        return x
    if reason := synthesizers.why_not(x):
        raise _NotCompiled(reason)
    compiled = copy.copy(x)
    if isinstance(compiled, Refine):
        compiled._program_factory = compiled._default_program_factory
    compiled._prompt_helper = remembering(x._prompt_helper)
    vars(compiled)["get_response"] = functools.partial(_get_response, compiled)
    vars(compiled)["aget_response"] = functools.partial(_aget_response, compiled)
    return compiled


def _compile_extractor(x: BaseExtractor) -> Any:
    if isinstance(x, extractors.CompiledExtractor):
        return x
    if reason := extractors.why_not(x):
        raise _NotCompiled(reason)
    return extractors.compile_extractor(x)


def _compile_runner(x: BatchEvalRunner) -> BatchEvalRunner:
    if "aevaluate_responses" in vars(x):
        return x
    if reason := evaluators.why_not(x):
        raise _NotCompiled(reason)
    return evaluators.compile_runner(x)


def _compile_engine(x: Any) -> Any:
    parts: dict[str, Any] = {}
    reasons: list[str] = []

    def compiled(part: Any) -> Any:
        try:
            return _compile(part)
        except _NotCompiled as reason:
            reasons.append(f"{type(part).__name__}: {reason}")
            return part

    for name in _PARTS[type(x)]:
        old = getattr(x, name)
        match old:
            case list():
                new: Any = [compiled(part) for part in old]
            case dict():
                new = {key: compiled(part) for key, part in old.items()}
            case _:
                new = compiled(old)
        parts[name] = new
    if all(_same(getattr(x, name), new) for name, new in parts.items()):
        raise _NotCompiled("; ".join(reasons) or "it is compiled already")
    engine = copy.copy(x)
    vars(engine).update(parts)
    return engine


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, list):
        return all(map(_same, old, new))
    if isinstance(old, dict):
        return _same(list(old.values()), list(new.values()))
    return old is new


def _get_response(synthesizer: BaseSynthesizer, *args: Any, **kwargs: Any) -> Any:
    return get_response(type(synthesizer).get_response, synthesizer, *args, **kwargs)


async def _aget_response(synthesizer: BaseSynthesizer, *args: Any, **kwargs: Any) -> Any:
    return await aget_response(type(synthesizer).aget_response, synthesizer, *args, **kwargs)


def get_response(native: Callable[..., Any], synthesizer: BaseSynthesizer, *args: Any, **kwargs: Any) -> Any:
    """``native(synthesizer, ...)``, answered from a program."""
    with splitting_once():
        run = _prepare(synthesizer, args, kwargs, asynchronous=False)
        if run is None:
            return native(synthesizer, *args, **kwargs)
        try:
            response = run.call(native, synthesizer, *args, **kwargs)
        except BaseException:
            run.close()
            raise
    if isinstance(response, Generator):
        return PlannedStream(response, run)
    run.close()
    return response


async def aget_response(native: Callable[..., Any], synthesizer: BaseSynthesizer, *args: Any, **kwargs: Any) -> Any:
    """``await native(synthesizer, ...)``, answered from a program."""
    with splitting_once():
        run = _prepare(synthesizer, args, kwargs, asynchronous=True)
        if run is None:
            return await native(synthesizer, *args, **kwargs)
        try:
            response = await run.acall(native(synthesizer, *args, **kwargs))
        except BaseException:
            await run.aclose()
            raise
    if isinstance(response, AsyncGenerator):
        return AsyncPlannedStream(response, run)
    await run.aclose()
    return response


def _prepare(
    synthesizer: BaseSynthesizer, args: tuple[Any, ...], kwargs: dict[str, Any], *, asynchronous: bool
) -> Run | None:
    """A run with its program started; None if the calls are not known ahead, or are those of the run around.

    A tree that goes on another level deep comes here again, with the summaries as its text: if the root was not
    planned for them, they get a program of their own.
    """
    lowered = _lower(synthesizer, *args, **kwargs)
    if lowered is None:
        return None
    around = CURRENT_RUN.get()
    if around is not None and around.holds(lowered.plan.ready_keys()):
        return None
    if around is not None and around.owner is synthesizer:
        around.drop()
        around.add(lowered)
        return None
    run = Run(synthesizer, asynchronous=asynchronous)
    run.add(lowered)
    return run


def _lower(synthesizer: BaseSynthesizer, query_str: str, text_chunks: Any, *args: Any, **kwargs: Any) -> Lowered | None:
    if args:
        logger.info("%s sends ordinary requests: arguments without a name are not planned.", type(synthesizer).__name__)
        return None
    return synthesizers.lower(synthesizer, query_str, text_chunks, kwargs)
