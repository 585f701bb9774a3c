"""`explain`: verdicts, reasons and pictures; and that it says what a run then does."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from chain_corpus import CASES, CHUNKS, TEXT, Case, chain_of_three, chat, map_reduce_mustache
from chain_corpus_documents import DOCUMENT_CASES, retriever
from chain_corpus_steps import (
    STEP_CASES,
    branch_on_an_answer,
    function_between,
    map_on_an_answer,
    missing_variable,
    template_that_reads,
)
from langchain_core.runnables import Runnable

from langchain_macaw import ChatMacaw, compile, explain
from langchain_macaw.explanation import Explanation
from scripted_macaw_server import Recorder

X = {"x": "1"}


def verdicts(explanation: Explanation) -> list[str]:
    """The steps that are not made of others."""
    return [f"{step.verdict} {step.name}" for step in explanation.steps if step.verdict]


def why(explanation: Explanation, verdict: str) -> list[str]:
    return [step.why for step in explanation.steps if step.verdict == verdict]


def test_static_chain(llm: ChatMacaw) -> None:
    explanation = explain(chain_of_three(llm), {"topic": "x"})
    assert why(explanation, "call") == ["call-0 reads the input only", "call-1 reads call-0", "call-2 reads call-1"]
    assert str(explanation).splitlines()[:3] == [
        "3 calls sent at once.",
        "RunnableSequence",
        "  ChatPromptTemplate  static",
    ]
    assert repr(explanation) == str(explanation)


def test_client_step_and_what_waits_for_it(llm: ChatMacaw) -> None:
    explanation = explain(function_between(llm), X)
    assert verdicts(explanation) == [
        "static ChatPromptTemplate",
        "call ChatMacaw",
        "static StrOutputParser",
        "client RunnableLambda",
        "dynamic ChatPromptTemplate",
        "dynamic ChatMacaw",
        "dynamic StrOutputParser",
    ]
    assert why(explanation, "client") == ["a function: runs natively, once"]
    assert why(explanation, "dynamic")[0] == "planned when it is known: RunnableLambda"
    assert str(explanation).startswith("1 call sent at once, 1 step with calls to come later, 1 client step.\n")


def test_kinds_of_client_steps(llm: ChatMacaw) -> None:
    assert why(explain(retriever(llm), "What?"), "client") == [
        "a retriever: runs natively, once",
        "a function: runs natively, once",
    ]


def test_template_that_reads_an_answer_is_named(llm: ChatMacaw) -> None:
    explanation = explain(template_that_reads(llm), X)
    (step,) = (step for step in explanation.steps if "upper" in step.why)
    assert (step.name, step.verdict) == ("ChatPromptTemplate", "dynamic")


def test_branch_and_map_on_an_answer(llm: ChatMacaw) -> None:
    assert "dynamic RunnableBranch" in verdicts(explain(branch_on_an_answer(llm), X))
    assert why(explain(map_on_an_answer(llm), X), "dynamic") == ["planned when it is known: words"]


def test_error_points_at_the_step(llm: ChatMacaw) -> None:
    explanation = explain(missing_variable(llm), X)
    (step,) = (step for step in explanation.steps if step.verdict == "fails")
    assert step.name == "ChatPromptTemplate"
    assert step.why.startswith("KeyError: Input to ChatPromptTemplate is missing variables {'nothing'}.")
    assert explanation.steps[-1].why == "is not reached: ChatPromptTemplate fails"


def test_other_server(llm: ChatMacaw) -> None:
    other = ChatMacaw(model="m", base_url=llm.openai_api_base, api_key="another-tenant")
    assert why(explain(chat("{x}") | llm | TEXT | chat("{y}") | other, X), "dynamic") == [
        "another server, key or HTTP client: ordinary requests"
    ]


def test_wide_map_is_told_once(llm: ChatMacaw) -> None:
    lines = str(explain(map_reduce_mustache(llm), CHUNKS * 20)).splitlines()
    assert lines[0] == "101 calls sent at once."
    assert len(lines) < 12
    assert any("100 x /summaries[0]-0 reads the input only" in line for line in lines)
    assert lines[-2].endswith("call-100 reads /summaries[0]-0, /summaries[1]-1, /summaries[2]-2 and 97 more")


def test_pictures(llm: ChatMacaw) -> None:
    explanation = explain(function_between(llm), X)
    assert explanation.to_mermaid().splitlines() == [
        "graph LR",
        '  n0["ChatMacaw<br/>→ call-0"]',
        '  n1[["RunnableLambda<br/>→ client"]]',
        "  n0 --> n1",
        '  n2["ChatMacaw<br/>→ dynamic"]',
        "  n1 --> n2",
    ]
    root = ElementTree.fromstring(explanation._repr_svg_())
    assert len([e for e in root.iter() if re.search(r"\bbox\b", e.get("class", ""))]) == 3
    wide = explain(map_reduce_mustache(llm), CHUNKS * 20).to_mermaid()
    assert "100 x ChatMacaw" in wide
    assert wide.count("-->") == 1


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning")
@pytest.mark.parametrize("case", [*CASES, *STEP_CASES, *DOCUMENT_CASES], ids=lambda case: case.name)
def test_it_says_what_is_sent_and_sends_nothing(case: Case, llm: ChatMacaw, recorder: Recorder) -> None:
    explanation = explain(compile(case.build(llm)), case.input)
    assert str(explanation)
    assert ElementTree.fromstring(explanation.to_svg()) is not None
    assert not recorder.requests
    if case.static and not case.raises:
        assert explanation.num_calls == case.num_calls
    if not case.sequential:
        try_invoke(compile(case.build(llm)), case.input)
        first = recorder.programs[0].calls if recorder.programs else []
        # A program starts with what is known at once; without such calls, with what a client step made known.
        assert explanation.num_calls in (0, len(first))


def try_invoke(chain: Runnable[Any, Any], value: Any) -> None:
    try:
        chain.invoke(value)
    except Exception:  # some chains are made to fail
        return
