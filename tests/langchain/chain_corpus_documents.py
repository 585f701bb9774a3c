"""Chains over documents: retrieval, and the legacy chains of `langchain_classic`."""

from __future__ import annotations

import warnings
from typing import Any

from chain_corpus import TEXT, Case, chat
from chain_corpus_steps import then
from langchain_classic.chains import (
    ConversationalRetrievalChain,
    ConversationChain,
    LLMChain,
    RetrievalQA,
    SequentialChain,
    SimpleSequentialChain,
    TransformChain,
    create_history_aware_retriever,
    create_retrieval_chain,
)
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.chains.question_answering import load_qa_chain
from langchain_classic.chains.summarize import load_summarize_chain
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnablePassthrough

from langchain_macaw import ChatMacaw

DOCUMENTS = [Document(f"Fact {i}: {{parrots}} & <birds>.", metadata={"page": i}) for i in range(3)]
QUESTION = {"input": "What of parrots?"}
DOCUMENT_CASES: list[Case] = []


class Shelf(BaseRetriever):
    """Finds the documents whose number is in the query, else the first two."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [d for d in DOCUMENTS if str(d.metadata["page"]) in query][:2] or DOCUMENTS[:2]


def case(value: Any, num_calls: int, *, static: bool = False, **kwargs: Any) -> Any:
    """Register a chain under its function's name; deprecated ones warn when they are built."""

    def register(build: Any) -> Any:
        def built(llm: ChatMacaw) -> Runnable[Any, Any]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return build(llm)  # type: ignore[no-any-return]

        DOCUMENT_CASES.append(Case(build.__name__, built, value, num_calls, static=static, **kwargs))
        return build

    return register


def joined(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def counting(llm: ChatMacaw) -> ChatMacaw:
    """A model that counts tokens on its own: chains that split by length ask it."""
    return llm.model_copy(update={"custom_get_token_ids": list})


def prompt(template: str) -> PromptTemplate:
    return PromptTemplate.from_template(template)


@case("What of parrots?", 1)
def retriever(llm: ChatMacaw) -> Runnable[Any, Any]:
    return {"context": Shelf() | joined, "q": RunnablePassthrough()} | chat("{context}\n{q}") | llm | TEXT


@case("What of 2 parrots?", 3)
def rewritten_query(llm: ChatMacaw) -> Runnable[Any, Any]:
    search = chat("Rewrite: {q}") | llm | TEXT | Shelf() | joined
    return {"context": search, "q": RunnablePassthrough()} | chat("{context}\n{q}") | llm | TEXT | then(llm)


@case(["Find 0", "Find 1", "Find 2"], 3)
def batch_of_searches(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ({"context": Shelf() | joined} | chat("Sum up {context}") | llm | TEXT).map()


@case({"context": DOCUMENTS}, 1)
def stuff_documents(llm: ChatMacaw) -> Runnable[Any, Any]:
    return create_stuff_documents_chain(llm, chat("Sum up:\n{context}"))


@case(QUESTION, 1)
def retrieval_chain(llm: ChatMacaw) -> Runnable[Any, Any]:
    stuff = create_stuff_documents_chain(llm, chat("By {context} answer {input}"))
    return create_retrieval_chain(Shelf(), stuff)


@case({**QUESTION, "chat_history": [HumanMessage("hi"), AIMessage("ho")]}, 2)
def history_aware_retrieval_chain(llm: ChatMacaw) -> Runnable[Any, Any]:
    rephrase = ChatPromptTemplate.from_messages([MessagesPlaceholder("chat_history"), ("human", "Rephrase {input}")])
    stuff = create_stuff_documents_chain(llm, chat("By {context} answer {input}"))
    return create_retrieval_chain(create_history_aware_retriever(llm, Shelf(), rephrase), stuff)


@case({**QUESTION, "chat_history": []}, 1)
def history_aware_retrieval_chain_without_history(llm: ChatMacaw) -> Runnable[Any, Any]:
    return history_aware_retrieval_chain(llm)  # type: ignore[no-any-return]


@case({"x": "1"}, 1)
def llm_chain(llm: ChatMacaw) -> Runnable[Any, Any]:
    return LLMChain(llm=llm, prompt=chat("Ask {x}"))


@case({"x": "1"}, 2)
def sequential_chain(llm: ChatMacaw) -> Runnable[Any, Any]:
    chains = [
        LLMChain(llm=llm, prompt=chat("Ask {x}"), output_key="y"),
        LLMChain(llm=llm, prompt=chat("Then {y}, {x}"), output_key="z"),
    ]
    return SequentialChain(chains=chains, input_variables=["x"], output_variables=["y", "z"])


@case("1", 2)
def simple_sequential_chain(llm: ChatMacaw) -> Runnable[Any, Any]:
    chains = [LLMChain(llm=llm, prompt=prompt("Ask {x}")), LLMChain(llm=llm, prompt=prompt("Then {y}"))]
    return SimpleSequentialChain(chains=chains)


@case({"x": "1"}, 2)
def transform_chain(llm: ChatMacaw) -> Runnable[Any, Any]:
    first = LLMChain(llm=llm, prompt=prompt("Ask {x}"), output_key="y")
    upper = TransformChain(
        input_variables=["y"], output_variables=["u"], transform=lambda inputs: {"u": inputs["y"].upper()}
    )
    last = LLMChain(llm=llm, prompt=prompt("Then {u}"), output_key="z")
    return SequentialChain(chains=[first, upper, last], input_variables=["x"])


@case({"input_documents": DOCUMENTS}, 1)
def summarize_stuff(llm: ChatMacaw) -> Runnable[Any, Any]:
    return load_summarize_chain(llm, "stuff", prompt=prompt("Sum up: {text}"))


@case({"input_documents": DOCUMENTS}, 4)
def summarize_map_reduce(llm: ChatMacaw) -> Runnable[Any, Any]:
    chain: Any = load_summarize_chain(
        counting(llm), "map_reduce", map_prompt=prompt("Sum up: {text}"), combine_prompt=prompt("Combine: {text}")
    )
    return chain  # type: ignore[no-any-return]


@case({"input_documents": DOCUMENTS}, 3)
def summarize_refine(llm: ChatMacaw) -> Runnable[Any, Any]:
    return load_summarize_chain(
        llm,
        "refine",
        question_prompt=prompt("Sum up: {text}"),
        refine_prompt=prompt("Refine {existing_answer} by {text}"),
    )


@case({"input_documents": DOCUMENTS, "question": "What of parrots?"}, 4)
def qa_map_reduce(llm: ChatMacaw) -> Runnable[Any, Any]:
    return load_qa_chain(
        counting(llm),
        "map_reduce",
        question_prompt=prompt("From {context} answer {question}"),
        combine_prompt=prompt("Combine {summaries} for {question}"),
    )


@case({"query": "What of parrots?"}, 1)
def retrieval_qa(llm: ChatMacaw) -> Runnable[Any, Any]:
    return RetrievalQA.from_chain_type(
        llm, retriever=Shelf(), chain_type_kwargs={"prompt": prompt("{context} {question}")}
    )


@case({"question": "What of parrots?", "chat_history": [("hi", "ho")]}, 2)
def conversational_retrieval(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ConversationalRetrievalChain.from_llm(
        llm,
        Shelf(),
        condense_question_prompt=prompt("{chat_history} {question}"),
        combine_docs_chain_kwargs={"prompt": prompt("{context} {question}")},
    )


@case({"input": "And then?"}, 1, sequential=True)
def conversation_chain(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ConversationChain(llm=llm)
