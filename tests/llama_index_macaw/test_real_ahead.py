"""Refine, compiled, on a real engine: what is constant in a later call is computed while the answer before is written.

The program's record and timeline say so, token by token; how long anything takes is for benchmarks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.chat_prompts import CHAT_REFINE_PROMPT
from llama_index.core.prompts.default_prompts import DEFAULT_REFINE_PROMPT
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import Refine

from llama_index.llms.macaw import Macaw, compile
from llama_index_macaw.observing import FixedRetriever
from macaw import MacawClient
from macaw.protocol import CallState, ProgramState
from macaw.timeline import render_timeline
from macaw_server.serve import LocalServer
from macaw_server.service.ahead import MIN_PREFIX_TOKENS
from noise import NOISE

TEXTS = [f"Part {i}. " + f"The macaw number {i} flies, eats nuts and talks. " * 11 for i in range(4)]
QUESTION = "What does it eat?"
ANSWER_TOKENS = 250  # many steps, beside which there is room for what is computed ahead
CONTEXT_FIRST = PromptTemplate("{context_msg}\nAnswer better: {query_str}\nThe answer so far: {existing_answer}")
TEMPLATES = {"for chats": CHAT_REFINE_PROMPT, "own": CONTEXT_FIRST, "for completions": DEFAULT_REFINE_PROMPT}
SLACK = 32  # a page that is not full, a last word, the chat template

Refined = Callable[[str, str], tuple[str, ProgramState]]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, LocalServer]]:
    """One that works ahead, beside a decode too; one that does so for constant text only, and one not at all."""
    common = {**NOISE, "dtype": "float32", "max_model_len": 2048, "ahead_rows": 32}
    with (
        LocalServer(**common, prefill_ahead=False) as off,
        LocalServer(**common, pipelining=False) as constant,
        LocalServer(**common) as on,
    ):
        yield {"off": off, "constant": constant, "on": on}


@pytest.fixture(scope="module")
def refined(servers: dict[str, LocalServer]) -> Refined:
    """The answer by a template, and its record, from a server."""

    @functools.cache
    def run(template: str, server: str) -> tuple[str, ProgramState]:
        options = {"temperature": 0, "max_tokens": ANSWER_TOKENS, "additional_kwargs": {"ignore_eos": True}}
        llm = Macaw("macaw-demo", api_base=servers[server].url, **options)
        helper = PromptHelper(context_window=2048, num_output=ANSWER_TOKENS)
        synthesizer = Refine(llm=llm, prompt_helper=helper, refine_template=TEMPLATES[template])
        answer = str(compile(RetrieverQueryEngine(FixedRetriever(TEXTS), synthesizer)).query(QUESTION))
        with MacawClient(servers[server].url) as client:
            return answer, client.get_program(client.list_programs()[-1].id)

    return run


@pytest.fixture
def constant_tokens(servers: dict[str, LocalServer]) -> Callable[[BasePromptTemplate], int]:
    """How many tokens there are before the earlier answer."""
    service = servers["on"].service
    assert service is not None
    tokenizer = service.models.find(None).tokenizer

    def count(template: BasePromptTemplate) -> int:
        prompt = template.format(context_msg=TEXTS[1], query_str=QUESTION, existing_answer="\0")
        return len(tokenizer.encode(prompt.split("\0")[0]))

    return count


def later_calls(program: ProgramState) -> list[CallState]:
    first, *later = sorted(program.calls, key=lambda call: call.depth)
    assert (first.timings.prefilled_ahead_tokens, len(later)) == (0, len(TEXTS) - 1)
    return later


def prompt_tokens(call: CallState) -> tuple[int, int]:
    """Those found in the cache when the call began, and those computed then."""
    assert call.completion is not None
    usage = call.completion["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return cached, usage["prompt_tokens"] - cached


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_constant_text_is_there_when_the_answer_is(
    template: str, refined: Refined, constant_tokens: Callable[[BasePromptTemplate], int]
) -> None:
    answer, program = refined(template, "constant")
    expected, plain = refined(template, "off")
    assert answer == expected
    num_constant = constant_tokens(TEMPLATES[template])
    assert (num_constant > 200) == (template != "for completions")
    for call, without in zip(later_calls(program), later_calls(plain), strict=True):
        cached, _ = prompt_tokens(call)
        assert cached <= num_constant + SLACK
        assert cached >= num_constant - SLACK or num_constant < MIN_PREFIX_TOKENS
        ahead = call.timings.prefilled_ahead_tokens
        assert ahead == cached - min(cached, prompt_tokens(without)[0])
        if ahead:
            assert call.timings.ahead_ms is not None
            assert call.timings.ready_ms is not None
            assert call.timings.ahead_ms < call.timings.ready_ms
        assert (ahead > 200) == (template != "for completions")


@pytest.mark.slow
def test_and_the_answer_as_far_as_it_is_written(refined: Refined) -> None:
    """What is left is what comes after the answer, and its last tokens; behind the answer nothing is known."""
    assert refined("for chats", "on")[0] == refined("for chats", "off")[0]
    for call in later_calls(refined("for chats", "on")[1]):
        cached, computed = prompt_tokens(call)
        assert computed < 100 < ANSWER_TOKENS < cached
    for call in later_calls(refined("for completions", "on")[1]):
        cached, computed = prompt_tokens(call)
        assert computed > 200
        assert cached > ANSWER_TOKENS - SLACK


def test_without_it(refined: Refined) -> None:
    for template in TEMPLATES:
        for call in later_calls(refined(template, "off")[1]):
            assert (call.timings.ahead_ms, call.timings.prefilled_ahead_tokens) == (None, 0)
            assert prompt_tokens(call)[1] > ANSWER_TOKENS + 200


def test_the_timeline_shows_it(refined: Refined) -> None:
    def rows(server: str) -> list[str]:
        lines = render_timeline(refined("for chats", server)[1]).splitlines()
        return [line for line in lines if line.startswith("*refine-")]

    assert ["░" in row for row in rows("on")] == [True] * 3
    assert ["░" in row for row in rows("off")] == [False] * 3


def test_also_in_what_is_planned_again(servers: dict[str, LocalServer], refined: Refined) -> None:
    """The first answer is stopped before its first word, so it is passed over, and the plan was wrong."""
    first = min(refined("for chats", "on")[1].calls, key=lambda call: call.depth)
    assert first.completion is not None
    begin = first.completion["choices"][0]["message"]["content"][:12]
    options = {"temperature": 0, "max_tokens": ANSWER_TOKENS, "additional_kwargs": {"ignore_eos": True, "stop": begin}}
    llm = Macaw("macaw-demo", api_base=servers["on"].url, **options)
    synthesizer = Refine(llm=llm, prompt_helper=PromptHelper(context_window=2048, num_output=ANSWER_TOKENS))
    engine = RetrieverQueryEngine(FixedRetriever(TEXTS), synthesizer)
    with MacawClient(servers["on"].url) as client:
        before = {program.id for program in client.list_programs()}
        answer = str(compile(engine).query(QUESTION))
        wrong, again = [program for program in client.list_programs() if program.id not in before]
    assert answer == str(engine.query(QUESTION))
    assert (len(wrong.calls), len(again.calls)) == (len(TEXTS), len(TEXTS) - 1)
    _, *later = sorted(again.calls, key=lambda call: call.depth)
    assert all(call.timings.prefilled_ahead_tokens for call in later)
