"""How each kind of response synthesizer is lowered: the calls that its `get_response` is about to make.

These functions follow LlamaIndex's, with its own prompt helpers and templates, for answers that fit where they are
put. What an answer changes beyond that (another level of the tree, a chunk that has to be split, an empty answer
that is passed over) shows when the native code asks for something else: see `llama_index.llms.macaw.compile`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.prompt_utils import get_biggest_prompt
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

from llama_index.llms.macaw.base import Macaw
from llama_index.llms.macaw.lowering import Lowering, NotStatic
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
    if isinstance(synthesizer, Refine):
        if synthesizer._structured_answer_filtering:
            return "it filters structured answers"
        if not hasattr(Refine, "_run_refine_loop"):
            return "refine of this llama-index-core is another one than that of 0.14"
    # Not by `get_prompts`, which opens a span.
    prompts = (value for value in vars(synthesizer).values() if isinstance(value, BasePromptTemplate))
    if synthesizer._llm.output_parser or any(prompt.output_parser for prompt in prompts):
        return "it has an output parser"
    return None


def lower(
    synthesizer: BaseSynthesizer, query_str: str, text_chunks: Sequence[str], kwargs: dict[str, Any]
) -> Lowered | None:
    """The calls that ``get_response(query_str, text_chunks, **kwargs)`` is about to make, if there are any.

    Raises:
        NotStatic: They cannot be told ahead.
    """
    if reason := why_not(synthesizer):  # prompts and models change after `compile`
        raise NotStatic(f"Not planned: {reason}.")
    lowering = Lowering(type(synthesizer).__name__)
    try:
        LOWERINGS[type(synthesizer)](lowering, synthesizer, query_str, text_chunks, dict(kwargs))
    except NotStatic as reason:
        logger.info("What %s asks for is planned in part: %s", type(synthesizer).__name__, reason)
    plan = lowering.plan()
    if plan is None or lowering.llm is None:
        return None
    return Lowered(plan, lowering.llm, sequential=isinstance(synthesizer, Refine))


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


def _refine(lowering: Lowering, s: Refine, query: str, chunks: Sequence[str], kwargs: dict[str, Any]) -> None:
    """A chain: each call reads the answer of the one before it."""
    answer = kwargs.pop("prev_response", None)
    if not (answer is None or isinstance(answer, str)):
        raise NotStatic("The previous response is a stream.")
    biggest = get_biggest_prompt([s._text_qa_template, s._refine_template])
    padding = s._response_padding_size
    queue = [
        part for chunk in chunks for part in s._prompt_helper.repack(biggest, [chunk], llm=s._llm, padding=padding)
    ]
    for i, chunk in enumerate(queue):
        if answer is None:
            template = s._text_qa_template.partial_format(query_str=query)
            answer = lowering.predict(s._llm, template, f"answer-{i}", context_str=chunk, **kwargs)
            continue
        template = s._refine_template.partial_format(query_str=query, existing_answer=answer)
        repacked = s._prompt_helper.repack(template, [chunk], llm=s._llm)
        if len(repacked) != 1:
            break
        answer = lowering.predict(s._llm, template, f"refine-{i}", context_msg=repacked[0], **kwargs)


def _compact_and_refine(
    lowering: Lowering, s: CompactAndRefine, query: str, chunks: Sequence[str], kwargs: dict[str, Any]
) -> None:
    _refine(lowering, s, query, s._make_compact_text_chunks(query, chunks), kwargs)


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
    Refine: _refine,
    CompactAndRefine: _compact_and_refine,
    Accumulate: _accumulate,
    CompactAndAccumulate: _compact_and_accumulate,
    SimpleSummarize: _simple,
    Generation: _generation,
}
