"""How refine is lowered: a chain, in which each call reads the answer of the one before it.

The loops follow LlamaIndex's, of which there are two. What they decide by an answer (it is empty, or so long that a
chunk has to be split) they decide as it does where the answer is known: then they are planned again from there on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.prompt_utils import get_biggest_prompt
from llama_index.core.response_synthesizers import CompactAndRefine, Refine

from llama_index.llms.macaw.lowering import Lowering, NotStatic

HAS_ONE_LOOP = hasattr(Refine, "_run_refine_loop")
"""Refine is that of llama-index-core 0.14, which leaves room for an answer when it packs chunks into prompts."""

_Loop = Callable[[Lowering, Any, str, Sequence[str], str | None, dict[str, Any]], None]


def why_not(synthesizer: Refine) -> str | None:
    """Why a refining synthesizer cannot be compiled; None if it can."""
    if synthesizer._structured_answer_filtering:
        return "it filters structured answers"
    if HAS_ONE_LOOP:
        return None
    if type(synthesizer) is CompactAndRefine:
        return "in this llama-index-core it fills prompts up, so that every answer splits the chunk behind it"
    return None if hasattr(Refine, "_give_response_single") else "refine of this llama-index-core is an unknown one"


def lower_refine(lowering: Lowering, s: Refine, query: str, chunks: Sequence[str], kwargs: dict[str, Any]) -> None:
    """The calls of `Refine`."""
    answer = kwargs.pop("prev_response", None)
    if not (answer is None or isinstance(answer, str)):
        raise NotStatic("The previous response is a stream.")
    _LOOP(lowering, s, query, chunks, answer, kwargs)


def lower_compact_and_refine(
    lowering: Lowering, s: CompactAndRefine, query: str, chunks: Sequence[str], kwargs: dict[str, Any]
) -> None:
    """The calls of `CompactAndRefine`."""
    lower_refine(lowering, s, query, s._make_compact_text_chunks(query, chunks), kwargs)


def _one_loop(
    lowering: Lowering, s: Refine, query: str, chunks: Sequence[str], answer: str | None, kwargs: dict[str, Any]
) -> None:
    """Of llama-index-core 0.14: an empty answer is passed over, unless it is streamed."""
    biggest = get_biggest_prompt([s._text_qa_template, s._refine_template])
    padding = s._response_padding_size
    queue = deque(
        part for chunk in chunks for part in s._prompt_helper.repack(biggest, [chunk], llm=s._llm, padding=padding)
    )
    num_steps = 0
    while queue:
        chunk = queue.popleft()
        if answer is None:
            template = s._text_qa_template.partial_format(query_str=query)
            new = lowering.predict(s._llm, template, f"answer-{num_steps}", context_str=chunk, **kwargs)
        else:
            template = s._refine_template.partial_format(query_str=query, existing_answer=answer)
            parts = _split(lowering, s, template, chunk)
            if len(parts) > 1:
                queue.extendleft(parts)
                continue
            new = lowering.predict(s._llm, template, f"refine-{num_steps}", context_msg=parts[0], **kwargs)
        if new or s._streaming:
            answer = new
        num_steps += 1


def _nested_loops(
    lowering: Lowering, s: Any, query: str, chunks: Sequence[str], answer: str | None, kwargs: dict[str, Any]
) -> None:
    """Of llama-index-core 0.12: what a chunk is split into is asked for with the same answer, unless it is streamed."""

    def give(i: int, chunk: str) -> str:
        template = s._text_qa_template.partial_format(query_str=query)
        answer: str | None = None
        for j, part in enumerate(s._prompt_helper.repack(template, [chunk], llm=s._llm)):
            if answer is None:
                answer = lowering.predict(s._llm, template, f"answer-{i}", context_str=part, **kwargs)
            else:
                answer = refine(f"{i}.{j}", part, answer)
        return answer if answer is not None and s._streaming else answer or "Empty Response"

    def refine(name: str, chunk: str, answer: str) -> str:
        template = s._refine_template.partial_format(query_str=query, existing_answer=answer)
        if s._prompt_helper._get_available_chunk_size(template) < 0:
            return answer
        for part in _split(lowering, s, template, chunk):
            if s._streaming:
                template = s._refine_template.partial_format(query_str=query, existing_answer=answer)
            answer = lowering.predict(s._llm, template, f"refine-{name}", context_msg=part, **kwargs)
        return answer

    for i, chunk in enumerate(chunks):
        answer = give(i, chunk) if answer is None else refine(str(i), chunk, answer)


def _split(lowering: Lowering, s: Refine, template: BasePromptTemplate, chunk: str) -> list[str]:
    """A chunk as it fits into a template that has an answer in it."""
    parts: list[str] = s._prompt_helper.repack(template, [chunk], llm=s._llm)
    if len(parts) > 1 and lowering.num_calls:
        raise NotStatic("How a chunk is split depends on the length of an answer that does not exist yet.")
    return parts


_LOOP: _Loop = _one_loop if HAS_ONE_LOOP else _nested_loops
