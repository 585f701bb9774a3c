"""Rules for the chains of `langchain_classic` whose calls follow from their fields. Imported with the first such chain.

Subclasses, and chains with memory, are client steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from langchain_classic.chains import (
    LLMChain,
    MapReduceDocumentsChain,
    ReduceDocumentsChain,
    RefineDocumentsChain,
    StuffDocumentsChain,
)
from langchain_classic.chains.combine_documents.base import BaseCombineDocumentsChain
from langchain_core.prompts import BasePromptTemplate

from langchain_macaw.lowering import Lowering, Scope
from langchain_macaw.pending import rendered
from langchain_macaw.registry import rule
from langchain_macaw.sentinel import NotStatic

Inputs = Mapping[str, Any]


class _Document(NamedTuple):
    """A `Document` whose text may be an answer to come."""

    text: Any
    metadata: Inputs


def _is_plain(kind: type[Any]) -> Callable[[Any], bool]:
    return lambda chain: type(chain) is kind and chain.memory is None


@rule(LLMChain, applies=_is_plain(LLMChain), whole=True)
def _llm_chain(lowering: Lowering, chain: LLMChain, value: Any, scope: Scope) -> Any:
    if not chain.return_final_only:
        raise NotStatic("The chain gives whole generations.")
    inputs = _inputs(chain, value)
    return _outputs(inputs, {chain.output_key: _text(lowering, chain, inputs, scope)}, scope)


@rule(StuffDocumentsChain, applies=_is_plain(StuffDocumentsChain), whole=True)
@rule(RefineDocumentsChain, applies=_is_plain(RefineDocumentsChain), whole=True)
@rule(ReduceDocumentsChain, applies=_is_plain(ReduceDocumentsChain), whole=True)
@rule(MapReduceDocumentsChain, applies=_is_plain(MapReduceDocumentsChain), whole=True)
def _documents_chain(lowering: Lowering, chain: BaseCombineDocumentsChain, value: Any, scope: Scope) -> Any:
    inputs = _inputs(chain, value)
    documents = inputs[chain.input_key]
    if not isinstance(documents, list) or "token_max" in inputs:
        raise NotStatic("The documents are not known ahead.")
    documents = [_Document(document.page_content, document.metadata) for document in documents]
    others = {key: item for key, item in inputs.items() if key != chain.input_key}
    text, steps = _combine(lowering, chain, documents, others, scope)
    outputs = {chain.output_key: text}
    if getattr(chain, "return_intermediate_steps", False):
        outputs["intermediate_steps"] = steps
    return _outputs(inputs, outputs, scope)


def _combine(
    lowering: Lowering, chain: BaseCombineDocumentsChain, documents: list[_Document], others: Inputs, scope: Scope
) -> tuple[Any, list[Any]]:
    """The text that a chain makes of documents, and the texts on the way there."""
    match chain:
        case StuffDocumentsChain(llm_chain=llm_chain):
            texts = [_rendered_document(document, chain.document_prompt) for document in documents]
            inputs = {key: item for key, item in others.items() if key in llm_chain.prompt.input_variables}
            inputs[chain.document_variable_name] = rendered(chain.document_separator.join, texts)
            return _text(lowering, llm_chain, inputs, scope), []
        case ReduceDocumentsChain():
            # Planned as if nothing had to be collapsed: how long the answers will be, nobody knows.
            return _combine(lowering, chain.combine_documents_chain, documents, others, scope)
        case MapReduceDocumentsChain(llm_chain=llm_chain, document_variable_name=name):
            steps = [
                _text(lowering, llm_chain, {name: document.text, **others}, scope.at(f"/map[{i}]"))
                for i, document in enumerate(documents)
            ]
            mapped = [_Document(step, document.metadata) for step, document in zip(steps, documents, strict=True)]
            text, _ = _combine(lowering, chain.reduce_documents_chain, mapped, others, scope.at("/reduce"))
            return text, steps
        case RefineDocumentsChain(document_variable_name=name):
            text, steps = None, []
            for i, document in enumerate(documents):
                inputs = {name: _rendered_document(document, chain.document_prompt)}
                if i:
                    inputs[chain.initial_response_name] = text
                llm_chain = chain.refine_llm_chain if i else chain.initial_llm_chain
                text = _text(lowering, llm_chain, {**inputs, **others}, scope.at(f"/refine[{i}]"))
                steps.append(text)
            return text, steps
    raise NotStatic(f"There is no rule for {type(chain).__name__}.")


def _text(lowering: Lowering, chain: LLMChain, inputs: Inputs, scope: Scope) -> Any:
    """What the parser of an `LLMChain` gives."""
    selected = {name: inputs[name] for name in chain.prompt.input_variables}
    prompt = rendered(lambda known: chain.prompt.format_prompt(**known), selected)
    stop = {"stop": inputs["stop"]} if "stop" in inputs else {}
    answer = lowering.lower(chain.llm, prompt, Scope(scope.path, {**stop, **chain.llm_kwargs}, scope.configurable))
    return lowering.lower(chain.output_parser, answer, scope.at())


def _rendered_document(document: _Document, prompt: BasePromptTemplate[str]) -> Any:
    known = {"page_content": document.text, **document.metadata}
    return rendered(lambda info: prompt.format(**info), {name: known[name] for name in prompt.input_variables})


def _inputs(chain: Any, value: Any) -> Inputs:
    """As `Chain.prep_inputs` without memory."""
    if isinstance(value, dict):
        return value
    (name,) = chain.input_keys
    return {name: value}


def _outputs(inputs: Inputs, outputs: Inputs, scope: Scope) -> Inputs:
    return outputs if scope.kwargs.get("return_only_outputs") else {**inputs, **outputs}
