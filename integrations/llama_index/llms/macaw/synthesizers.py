"""How each kind of response synthesizer is lowered: the calls that its `get_response` is about to make.

These functions follow LlamaIndex's, with its own prompt helpers and templates, for answers that fit where they are
put. What an answer changes beyond that (another level of the tree, a chunk that has to be split, an empty answer
that is passed over) shows when the native code asks for something else: see `llama_index.llms.macaw.compile`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.response_synthesizers import (
    Accumulate,
    BaseSynthesizer,
    CompactAndRefine,
    Generation,
    Refine,
    SimpleSummarize,
    TreeSummarize,
)
from llama_index.core.response_synthesizers.compact_and_accumulate import CompactAndAccumulate

from llama_index.llms.macaw import refine
from llama_index.llms.macaw.base import Macaw
from llama_index.llms.macaw.lowering import Lowering, NotStatic
from llama_index.llms.macaw.packing import planning
from llama_index.llms.macaw.plan import Plan
from llama_index.llms.macaw.running import Lowered

logger = logging.getLogger(__name__)

Lower = Callable[[Lowering, Any, str, Sequence[str], dict[str, Any]], None]


def why_not(synthesizer: BaseSynthesizer) -> str | None:
    """Why a synthesizer cannot be compiled; None if it can."""
    if type(synthesizer) not in LOWERINGS:
        return f"{type(synthesizer).__name__} is not one of {', '.join(kind.__name__ for kind in LOWERINGS)}"
    if not isinstance(synthesizer._llm, Macaw):
        return f"its LLM is a {type(synthesizer._llm).__name__}, not Macaw"
    if getattr(synthesizer, "_multimodal", False):
        return "it is multimodal"
    if synthesizer._output_cls is not None:
        return "it has an output_cls"
    if isinstance(synthesizer, Refine) and (reason := refine.why_not(synthesizer)):
        return reason
    # Not by `get_prompts`, which opens a span.
    prompts = (value for value in vars(synthesizer).values() if isinstance(value, BasePromptTemplate))
    if synthesizer._llm.output_parser or any(prompt.output_parser for prompt in prompts):
        return "it has an output parser"
    return None


def lower(
    synthesizer: BaseSynthesizer,
    query_str: str,
    text_chunks: Sequence[str],
    kwargs: dict[str, Any],
    answers: Sequence[str] = (),
) -> Lowered | None:
    """The calls that ``get_response(query_str, text_chunks, **kwargs)`` is about to make.

    Args:
        synthesizer: Whose `get_response`.
        query_str: The question.
        text_chunks: What it is asked of.
        kwargs: Further arguments, by name.
        answers: Of refine, what the calls made so far were answered; the plan is what comes behind them.

    Returns:
        None for no calls, and if they cannot be told ahead: the log says why.
    """
    lowering = Lowering(type(synthesizer).__name__, answers)
    try:
        plan = _plan(lowering, synthesizer, query_str, text_chunks, kwargs)
    except Exception as error:  # native code meets the same, and there it is the user's to see
        logger.debug("%s could not be lowered: %r", type(synthesizer).__name__, error)
        return None
    if plan is None or lowering.llm is None:
        return None
    again = functools.partial(lower, synthesizer, query_str, text_chunks, kwargs)
    return Lowered(plan, lowering.llm, replan=again if isinstance(synthesizer, Refine) else None)


def _plan(
    lowering: Lowering, synthesizer: BaseSynthesizer, query: str, chunks: Sequence[str], kwargs: dict[str, Any]
) -> Plan | None:
    kind = type(synthesizer)
    if reason := why_not(synthesizer):  # prompts and models change after `compile`
        logger.info("%s sends ordinary requests: %s.", kind.__name__, reason)
        return None
    try:
        with planning():
            LOWERINGS[kind](lowering, synthesizer, query, chunks, dict(kwargs))
    except NotStatic as not_static:
        logger.info("What %s asks for is planned in part: %s", kind.__name__, not_static)
    return lowering.plan()


def _tree(lowering: Lowering, s: TreeSummarize, query: str, chunks: Sequence[str], kwargs: dict[str, Any]) -> None:
    """Leaves, and behind them the root, if the prompt helper would put all summaries into one prompt."""
    template = s._summary_template.partial_format(query_str=query)
    chunks = s._prompt_helper.repack(template, text_chunks=chunks, llm=s._llm)
    if len(chunks) == 1:
        lowering.predict(s._llm, template, "root", context_str=chunks[0], **kwargs)
        return
    summaries = [
        lowering.predict(s._llm, template, f"leaf-{i}", context_str=chunk, **kwargs) for i, chunk in enumerate(chunks)
    ]
    packed = s._prompt_helper.repack(template, text_chunks=summaries, llm=s._llm)
    if packed == [_SEPARATOR.join(summaries)]:
        context = lowering.join(summaries, _SEPARATOR)
        lowering.predict(s._llm, template, "root", context_str=context, **kwargs)


def _accumulate(lowering: Lowering, s: Accumulate, query: str, chunks: Sequence[str], kwargs: dict[str, Any]) -> None:
    """One group: a call for each chunk."""
    kwargs.pop("separator", None)
    if s._streaming:
        raise NotStatic("Accumulate does not stream.")
    template = s._text_qa_template.partial_format(query_str=query)
    parts = [part for chunk in chunks for part in s._prompt_helper.repack(template, [chunk], llm=s._llm)]
    for i, part in enumerate(parts):
        lowering.predict(s._llm, template, f"answer-{i}", **_prompt_kwargs(s, part), **kwargs)


def _compact_and_accumulate(
    lowering: Lowering, s: CompactAndAccumulate, query: str, chunks: Sequence[str], kwargs: dict[str, Any]
) -> None:
    template = s._text_qa_template.partial_format(query_str=query)
    _accumulate(lowering, s, query, s._prompt_helper.repack(template, chunks, llm=s._llm), kwargs)


def _simple(lowering: Lowering, s: SimpleSummarize, query: str, chunks: Sequence[str], kwargs: dict[str, Any]) -> None:
    template = s._text_qa_template.partial_format(query_str=query)
    context: Any = s._prompt_helper.truncate(template, ["\n".join(chunks)], llm=s._llm)
    lowering.predict(s._llm, template, "answer", context_str=context, **kwargs)


def _generation(lowering: Lowering, s: Generation, query: str, chunks: Sequence[str], kwargs: dict[str, Any]) -> None:
    lowering.predict(s._llm, s._input_prompt, "answer", query_str=query, **kwargs)


def _prompt_kwargs(s: Accumulate, chunk: str) -> dict[str, Any]:
    make = getattr(s, "_make_prompt_kwargs", None)  # since 0.14
    return dict(make(chunk)) if make else {"context_str": chunk}


_SEPARATOR = "\n\n"  # of PromptHelper.repack

LOWERINGS: dict[type[BaseSynthesizer], Lower] = {
    TreeSummarize: _tree,
    Refine: refine.lower_refine,
    CompactAndRefine: refine.lower_compact_and_refine,
    Accumulate: _accumulate,
    CompactAndAccumulate: _compact_and_accumulate,
    SimpleSummarize: _simple,
    Generation: _generation,
}
