"""Chains of `langchain_classic`: the same answers, and one program where their calls follow from their fields."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from chain_corpus import chat
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import CommaSeparatedListOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from test_corpus import ASYNC_WAYS, WAYS, comparable, tree

from langchain_macaw import ChatMacaw, compile
from scripted_macaw_server import Recorder

pytest.importorskip("langchain_classic")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DOCUMENTS = [Document(f"Text {i} & <more>", metadata={"source": f"s{i}"}) for i in range(3)]
QUESTION = {"input": "Why?"}


class Docs(BaseRetriever):
    """The documents, whatever the question."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return DOCUMENTS


@dataclass(frozen=True)
class Case:
    """A chain, its input, how many calls it makes and how many requests it takes, beside the program."""

    name: str
    build: Callable[[ChatMacaw], Runnable[Any, Any]]
    num_calls: int
    growths: int = 0
    chats: int = 0
    input: Any = field(default_factory=lambda: {"input_documents": DOCUMENTS})


def summarize(kind: str, **kwargs: Any) -> Callable[[ChatMacaw], Runnable[Any, Any]]:
    from langchain_classic.chains.summarize import load_summarize_chain

    return lambda llm: load_summarize_chain(llm, kind, **kwargs)


def llm_chain(llm: ChatMacaw, **kwargs: Any) -> Any:
    from langchain_classic.chains import LLMChain

    return LLMChain(llm=llm, prompt=PromptTemplate.from_template("Joke about {x}"), **kwargs)


def stuff_with_sources(llm: ChatMacaw) -> Runnable[Any, Any]:
    from langchain_classic.chains import StuffDocumentsChain

    return StuffDocumentsChain(
        llm_chain=llm_chain(llm),
        document_variable_name="x",
        document_prompt=PromptTemplate.from_template("{source}: {page_content}"),
    )


def retrieval(llm: ChatMacaw) -> Runnable[Any, Any]:
    from langchain_classic.chains import create_retrieval_chain
    from langchain_classic.chains.combine_documents import create_stuff_documents_chain

    return create_retrieval_chain(Docs(), create_stuff_documents_chain(llm, chat("Of {context}: {input}")))


def history_aware(llm: ChatMacaw) -> Runnable[Any, Any]:
    from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
    from langchain_classic.chains.combine_documents import create_stuff_documents_chain

    rephrase = ChatPromptTemplate.from_messages([MessagesPlaceholder("chat_history"), ("human", "Rephrase {input}")])
    answer = create_stuff_documents_chain(llm, chat("Of {context}: {input}"))
    return create_retrieval_chain(create_history_aware_retriever(llm, Docs(), rephrase), answer)


CASES = [
    Case("llm_chain", llm_chain, 1, input={"x": "macaws"}),
    Case("llm_chain_of_a_string", llm_chain, 1, input="macaws"),
    Case("llm_chain_with_kwargs", lambda llm: llm_chain(llm, llm_kwargs={"max_tokens": 2}), 1, input={"x": "macaws"}),
    Case("llm_chain_stops", llm_chain, 1, input={"x": "macaws", "stop": ["END"]}),
    Case("llm_chain_of_a_binding", lambda llm: llm_chain(llm.bind(max_tokens=3)), 1, input={"x": "macaws"}),
    Case(
        "llm_chain_then_chain",
        lambda llm: llm_chain(llm) | chat("More of {text} on {x}") | llm,
        2,
        input={"x": "macaws"},
    ),
    Case(
        "llm_chain_that_parses",
        lambda llm: llm_chain(llm, output_parser=CommaSeparatedListOutputParser()) | chat("Of {text}") | llm,
        2,
        growths=1,
        input={"x": "macaws"},
    ),
    Case(
        "llm_chain_whole_generations",
        lambda llm: llm_chain(llm, return_final_only=False) | (lambda out: out["text"]) | chat("Of {text}") | llm,
        2,
        chats=1,
        input={"x": "macaws"},
    ),
    Case("stuff", summarize("stuff"), 1),
    Case("stuff_with_sources", stuff_with_sources, 1),
    Case("map_reduce", summarize("map_reduce"), 4),
    Case("map_reduce_steps", summarize("map_reduce", return_intermediate_steps=True), 4),
    Case("refine", summarize("refine"), 3),
    Case("refine_steps", summarize("refine", return_intermediate_steps=True), 3),
    Case("behind_a_step", lambda llm: (lambda x: {"input_documents": DOCUMENTS}) | summarize("map_reduce")(llm), 4),
    Case("retrieval", retrieval, 1, input=QUESTION),
    Case("history_aware_without", history_aware, 1, input=QUESTION),
    Case(
        "history_aware",
        history_aware,
        2,
        growths=1,
        input={**QUESTION, "chat_history": [HumanMessage("Hi"), AIMessage("Ho")]},
    ),
]


@pytest.fixture
def counting_llm(llm: ChatMacaw) -> ChatMacaw:
    """It counts tokens by itself; else `map_reduce` would download a tokenizer."""
    return llm.model_copy(update={"custom_get_token_ids": lambda text: [*range(len(text.split()))]})


def check(case: Case, way: str, recorder: Recorder, native: Any) -> None:
    times = 2 if "batch" in way else 1
    assert recorder.prompts == native
    assert native.total() == times * case.num_calls
    assert recorder.requests["program"] == 1
    assert recorder.requests["chat"] == times * case.chats
    if times == 1:
        assert recorder.requests["growth"] == case.growths
    assert not recorder.cancelled


@pytest.mark.parametrize("way", ["invoke", "batch", "stream"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same(case: Case, way: str, counting_llm: ChatMacaw, recorder: Recorder) -> None:
    chain, run = case.build(counting_llm), WAYS[way]
    expected, prompts = comparable(run(chain, case.input)), recorder.prompts
    recorder.clear()
    assert comparable(run(compile(chain), case.input)) == expected
    check(case, way, recorder, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ainvoke", "astream", "astream_events"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_same_async(case: Case, way: str, counting_llm: ChatMacaw, recorder: Recorder) -> None:
    chain, run = case.build(counting_llm), ASYNC_WAYS[way]
    expected, prompts = comparable(await run(chain, case.input)), recorder.prompts
    recorder.clear()
    assert comparable(await run(compile(chain), case.input)) == expected
    check(case, way, recorder, prompts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_trace(case: Case, counting_llm: ChatMacaw) -> None:
    def trace(chain: Runnable[Any, Any]) -> list[Any]:
        collector = RunCollectorCallbackHandler()
        chain.invoke(case.input, {"callbacks": [collector], "run_name": "the run"})
        return [tree(run) for run in collector.traced_runs]

    chain = case.build(counting_llm)
    assert trace(compile(chain)) == trace(chain)


def test_collapse_is_left_to_native_execution(llm: ChatMacaw, recorder: Recorder) -> None:
    """The plan takes the answers to fit; where they do not, the chain goes its own way."""

    def count_tokens(text: str) -> list[int]:
        return [*range(100 if text.count("says:") > 2 else 1)]

    counting_llm = llm.model_copy(update={"custom_get_token_ids": count_tokens})
    chain = summarize("map_reduce", token_max=50)(counting_llm)
    expected, prompts = chain.invoke({"input_documents": DOCUMENTS}), recorder.prompts
    assert prompts.total() == 3 + 2 + 1
    recorder.clear()
    assert compile(chain).invoke({"input_documents": DOCUMENTS}) == expected
    assert recorder.requests == {"program": 1, "chat": 2 + 1}
    assert not prompts - recorder.prompts


def test_memory_makes_a_client_step(counting_llm: ChatMacaw, recorder: Recorder) -> None:
    from langchain_classic.memory import ConversationBufferMemory

    chain = llm_chain(counting_llm, memory=ConversationBufferMemory(input_key="x"))
    compiled = compile(chain | chat("More of {text} and {history}") | counting_llm)
    compiled.invoke({"x": "a"})
    assert recorder.requests == {"chat": 1, "program": 1}
    compiled.invoke({"x": "b"})
    assert chain.memory.buffer.count("Human") == 2


def test_adapter_does_not_import_it() -> None:
    code = "import sys, langchain_macaw; assert 'langchain_classic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
