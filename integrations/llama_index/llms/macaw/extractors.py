"""Metadata extractors: a call for each node, sent as one program; of titles also the call that combines them.

As with synthesizers, what is planned here follows LlamaIndex's code, which then runs and is answered from the plan.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from operator import methodcaller
from types import new_class
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, TextBlock
from llama_index.core.extractors import (
    BaseExtractor,
    DocumentContextExtractor,
    KeywordExtractor,
    QuestionsAnsweredExtractor,
    SummaryExtractor,
    TitleExtractor,
)
from llama_index.core.extractors.document_context import is_text_node
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import BaseNode, TextNode

from llama_index.llms.macaw.base import Macaw
from llama_index.llms.macaw.fanout import Unit, answered, lower_units
from llama_index.llms.macaw.lowering import Lowering, NotStatic
from llama_index.llms.macaw.running import Lowered

logger = logging.getLogger(__name__)


class CompiledExtractor:
    """What `compile` makes of an extractor: goes before its class in a class that is named the same."""

    async def aextract(self, nodes: Sequence[BaseNode]) -> list[dict[str, Any]]:
        """As the extractor's own, answered from a program."""
        native: Any = super().aextract  # type: ignore[misc]
        metadata: list[dict[str, Any]] = await _aextract(native, self, nodes)
        return metadata

    def __reduce__(self) -> tuple[Any, ...]:
        return compile_extractor, (_of_class(self, type(self).__bases__[1]),)


def why_not(extractor: BaseExtractor) -> str | None:
    """Why an extractor cannot be compiled; None if it can."""
    if type(extractor) not in LOWERINGS:
        return f"{type(extractor).__name__} is not one of {', '.join(kind.__name__ for kind in LOWERINGS)}"
    return _why_not_model(extractor)


def compile_extractor(extractor: BaseExtractor) -> BaseExtractor:
    """A compiled copy."""
    compiled: BaseExtractor = _of_class(extractor, _compiled_class(type(extractor)))
    return compiled


async def aextract(native: Callable[..., Any], extractor: BaseExtractor, nodes: Sequence[BaseNode]) -> Any:
    """``await native(extractor, nodes)``, answered from a program; for `autocompile`."""
    return await _aextract(functools.partial(native, extractor), extractor, nodes)


async def _aextract(native: Callable[..., Any], extractor: Any, nodes: Sequence[BaseNode]) -> Any:
    return await answered(extractor, await _lower(extractor, nodes), functools.partial(native, nodes))


@functools.cache
def _compiled_class(kind: type[BaseExtractor]) -> type[BaseExtractor]:
    compiled: type[BaseExtractor] = new_class(
        kind.__name__, (CompiledExtractor, kind), exec_body=lambda body: body.update(__module__=kind.__module__)
    )
    return compiled


def _of_class(extractor: Any, kind: type[Any]) -> Any:
    """A copy of another class with the same fields."""
    extractor = copy.copy(extractor)
    object.__setattr__(extractor, "__class__", kind)
    return extractor


def _why_not_model(extractor: Any) -> str | None:
    if not isinstance(extractor.llm, Macaw):
        return f"its LLM is a {type(extractor.llm).__name__}, not Macaw"
    return "it has an output parser" if extractor.llm.output_parser else None


async def _lower(extractor: Any, nodes: Sequence[BaseNode]) -> list[Lowered]:
    """The calls that ``aextract(nodes)`` is about to make."""
    kind: Any = type(extractor).__bases__[1] if isinstance(extractor, CompiledExtractor) else type(extractor)
    try:
        if reason := _why_not_model(extractor):  # models change after `compile`
            raise NotStatic(f"Not planned: {reason}.")
        return lower_units(kind.__name__, [unit async for unit in LOWERINGS[kind](extractor, nodes)])
    except NotStatic as reason:
        logger.info("%s sends ordinary requests: %s", kind.__name__, reason)
    except Exception as error:  # native code meets the same, and there it is the user's to see
        logger.debug("%s could not be lowered: %r", kind.__name__, error)
    return []


async def _keywords(e: KeywordExtractor, nodes: Sequence[BaseNode]) -> AsyncIterator[Unit]:
    for i, node in _text_nodes(e, nodes):
        text = node.get_content(metadata_mode=e.metadata_mode)
        yield _predict(e, e.prompt_template, f"keywords-{i}", keywords=e.keywords, context_str=text)


async def _questions(e: QuestionsAnsweredExtractor, nodes: Sequence[BaseNode]) -> AsyncIterator[Unit]:
    for i, node in _text_nodes(e, nodes):
        text = node.get_content(metadata_mode=e.metadata_mode)
        yield _predict(e, e.prompt_template, f"questions-{i}", num_questions=e.questions, context_str=text)


async def _summaries(e: SummaryExtractor, nodes: Sequence[BaseNode]) -> AsyncIterator[Unit]:
    if not all(isinstance(node, TextNode) for node in nodes):
        raise NotStatic("A summary of what is no text is an error.")
    for i, node in enumerate(nodes):
        text = node.get_content(metadata_mode=e.metadata_mode)
        yield _predict(e, e.prompt_template, f"summary-{i}", context_str=text)


async def _titles(e: TitleExtractor, nodes: Sequence[BaseNode]) -> AsyncIterator[Unit]:
    """Candidates, which LlamaIndex asks for one after the other, are one group; a document's title reads its own."""

    def title(i: int, of_document: Sequence[TextNode], lowering: Lowering) -> None:
        template = PromptTemplate(template=e.node_template)
        candidates = [
            lowering.predict(e.llm, template, f"candidate-{i}-{j}", context_str=node.text)
            for j, node in enumerate(of_document)
        ]
        template = PromptTemplate(template=e.combine_template)
        lowering.predict(e.llm, template, f"title-{i}", context_str=", ".join(candidates))

    for i, of_document in enumerate(e.separate_nodes_by_ref_id(nodes).values()):
        yield functools.partial(title, i, of_document)


async def _contexts(e: DocumentContextExtractor, nodes: Sequence[BaseNode]) -> AsyncIterator[Unit]:
    """The document, and then a chunk of it."""
    documents: dict[str, Any] = {}
    llm: Any = e.llm
    for i, node in enumerate(sorted(nodes, key=lambda node: node.source_node.node_id if node.source_node else "")):
        if not (node.source_node and is_text_node(node)) or e.key in node.metadata:
            continue
        source = node.source_node.node_id
        if source not in documents:
            documents[source] = await e.docstore.aget_document(source, raise_error=False)
        document = documents[source]
        if document is None or not is_text_node(document):
            continue
        text = document.get_content()
        if e.oversized_document_strategy == "error" and e._count_tokens(text) > e.max_context_length:
            raise NotStatic("A document that is too long is an error.")
        asked = f"Here is the chunk we want to situate within the whole document:\n<chunk>{node.get_content()}</chunk>"
        messages = [
            ChatMessage(
                role="user",
                content=[TextBlock(text=f"<document>{text}</document>")],
                additional_kwargs={"cache_control": {"type": "ephemeral"}},
            ),
            ChatMessage(role="user", content=[TextBlock(text=f"{asked}\n{e.prompt}")]),
        ]
        if llm.metadata.is_chat_model:
            yield methodcaller("chat", llm, messages, f"context-{i}", max_tokens=e.max_output_tokens)
        else:
            prompt = llm.messages_to_prompt(messages)
            yield methodcaller("complete", llm, prompt, f"context-{i}", max_tokens=e.max_output_tokens)


def _text_nodes(e: BaseExtractor, nodes: Sequence[BaseNode]) -> list[tuple[int, BaseNode]]:
    """Those that the extractor asks for something, with their places."""
    return [(i, node) for i, node in enumerate(nodes) if isinstance(node, TextNode) or not e.is_text_node_only]


def _predict(e: Any, template: str, name: str, **prompt_args: Any) -> Unit:
    return methodcaller("predict", e.llm, PromptTemplate(template=template), name, **prompt_args)


LOWERINGS: dict[type[BaseExtractor], Callable[[Any, Sequence[BaseNode]], AsyncIterator[Unit]]] = {
    KeywordExtractor: _keywords,
    QuestionsAnsweredExtractor: _questions,
    SummaryExtractor: _summaries,
    TitleExtractor: _titles,
    DocumentContextExtractor: _contexts,
}
