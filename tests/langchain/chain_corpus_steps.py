"""Chains with client steps: functions, tools, parsers, branches and maps on an answer; and chains that fail."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Iterator
from operator import itemgetter
from typing import Any

from chain_corpus import CHUNKS, TEXT, TOPIC, Case, chat, map_summaries
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.example_selectors import LengthBasedExampleSelector
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, trim_messages
from langchain_core.output_parsers import (
    CommaSeparatedListOutputParser,
    JsonOutputParser,
    PydanticOutputParser,
    StrOutputParser,
)
from langchain_core.prompts import ChatPromptTemplate, FewShotPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import (
    ConfigurableField,
    RouterRunnable,
    Runnable,
    RunnableBranch,
    RunnableGenerator,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
    RunnablePick,
    chain,
)
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import tool
from pydantic import BaseModel

from langchain_macaw import ChatMacaw

X = {"x": "1"}
STEP_CASES: list[Case] = []


class Facts(BaseModel):
    """What the scripted server answers to a prompt that ends in JSON."""

    name: str
    length: int


def case(value: Any, num_calls: int, *, static: bool = False, **kwargs: Any) -> Any:
    """Register a chain under its function's name."""

    def register(build: Any) -> Any:
        STEP_CASES.append(Case(build.__name__, build, value, num_calls, static=static, **kwargs))
        return build

    return register


def words(text: str) -> list[dict[str, str]]:
    """Three inputs out of an answer."""
    return [{"word": word} for word in text.split()[:3]]


def upper(chunks: Iterator[str]) -> Iterator[str]:
    for chunk in chunks:
        yield chunk.upper()


async def aupper(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    async for chunk in chunks:
        yield chunk.upper()


@tool
def shout(text: str) -> str:
    """Say it louder."""
    return f"{text}!"


def ask(llm: ChatMacaw) -> Runnable[Any, Any]:
    return chat("Ask {x}") | llm | TEXT


def then(llm: ChatMacaw) -> Runnable[Any, Any]:
    return chat("Then {y}") | llm | TEXT


# -----------------------------------------------------------------------------------------------------------
# Functions, generators, tools


@case(X, 1)
def function_before(llm: ChatMacaw) -> Runnable[Any, Any]:
    return RunnableLambda(lambda value: {"x": value["x"] * 3}) | ask(llm)


@case(X, 2)
def function_between(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm) | (lambda text: text[::-1]) | then(llm)


@case(X, 1, static=True)
def function_behind(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm) | len


@case(X, 3)
def function_beside(llm: ChatMacaw) -> Runnable[Any, Any]:
    steps = RunnableParallel(x=ask(llm), c=RunnableLambda(lambda value: f"{len(value)}!"))
    return steps | RunnablePassthrough.assign(d=chat("{x}") | llm | TEXT) | chat("{x} {c} {d}") | llm


@case(X, 3)
def functions_and_calls_in_turn(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm) | str.upper | then(llm) | str.lower | chat("At last {z}") | llm


@case(TOPIC, 2)
def assigned_function(llm: ChatMacaw) -> Runnable[Any, Any]:
    draft = RunnablePassthrough.assign(draft=chat("Draft {topic}") | llm | TEXT)
    return draft | RunnablePassthrough.assign(n=lambda d: len(d["draft"])) | chat("{draft} of {n}") | llm | TEXT


@case(X, 2)
def function_that_returns_a_chain(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm) | RunnableLambda(lambda text: then(llm) if "says" in text else text)


@case(X, 2)
def function_that_calls_a_chain(llm: ChatMacaw) -> Runnable[Any, Any]:
    @chain
    def twice(value: dict[str, str]) -> str:
        return str(then(llm).invoke(ask(llm).invoke(value)))

    return twice


@case(CHUNKS[:3], 6)
def map_with_a_function_in_it(llm: ChatMacaw) -> Runnable[Any, Any]:
    return (chat("Sum up {text}") | llm | TEXT | str.title | then(llm)).map()


@case(X, 2)
def generator(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm) | RunnableGenerator(upper, aupper) | then(llm)


@case(X, 2)
def tool_between(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm) | (lambda text: {"text": text}) | shout | then(llm)


@case(X, 2)
def passthrough_with_a_function(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm) | RunnablePassthrough(lambda text: None) | then(llm)


@case({"messages": [SystemMessage("Be kind."), HumanMessage("a"), AIMessage("b"), HumanMessage("c")]}, 1)
def trimmed_messages(llm: ChatMacaw) -> Runnable[Any, Any]:
    trim = trim_messages(max_tokens=2, token_counter=len, include_system=True, strategy="last")
    return itemgetter("messages") | trim | llm


@case([{"word": "a"}, {"word": "b"}], 3)
def mapped_function_and_reduce(llm: ChatMacaw) -> Runnable[Any, Any]:
    lines = (chat("Say {word}") | llm | TEXT | RunnableLambda(lambda text: text.split("\n")[0])).map()
    return {"lines": lines} | chat("{% for l in lines %}{{ l }};{% endfor %}", "jinja2") | llm


# -----------------------------------------------------------------------------------------------------------
# Parsers and templates that read an answer


@case(X, 2)
def json_parser(llm: ChatMacaw) -> Runnable[Any, Any]:
    return chat("{x} as JSON") | llm | JsonOutputParser() | chat("{name} of {length}") | llm


@case(X, 2)
def json_parser_and_itemgetter(llm: ChatMacaw) -> Runnable[Any, Any]:
    return chat("{x} as JSON") | llm | JsonOutputParser() | {"y": itemgetter("name")} | then(llm)


@case(X, 1, static=True)
def pydantic_parser(llm: ChatMacaw) -> Runnable[Any, Any]:
    return chat("{x} as JSON") | llm | PydanticOutputParser(pydantic_object=Facts)


@case(X, 1)
def json_mode(llm: ChatMacaw) -> Runnable[Any, Any]:
    return chat("{x} as JSON") | llm.with_structured_output(Facts, method="json_mode")


@case(X, 4)
def list_parser_and_map(llm: ChatMacaw) -> Runnable[Any, Any]:
    listed = ask(llm) | (lambda text: ", ".join(text.split()[:3])) | CommaSeparatedListOutputParser()
    return listed | (chat("About {word}") | llm | TEXT).map()


@case(X, 2)
def text_parser_of_its_own(llm: ChatMacaw) -> Runnable[Any, Any]:
    return chat("Ask {x}") | llm | FirstWord() | then(llm)


class FirstWord(StrOutputParser):
    """A parser that reads the text."""

    def parse(self, text: str) -> str:
        return " ".join(text.split()[:1])


@case(X, 2)
def template_that_reads(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm) | chat("{{ y | upper }} {{ y | length }}", "jinja2") | llm


@case(X, 3)
def template_that_reads_beside_one_that_does_not(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm) | RunnableParallel(a=chat("{{ y | title }}", "jinja2") | llm | TEXT, b=then(llm))


@case(TOPIC, 2)
def format_spec(llm: ChatMacaw) -> Runnable[Any, Any]:
    return chat("Draft {topic}") | llm | TEXT | {"d": RunnablePassthrough()} | chat("{d:>200}") | llm | TEXT


@case({"q": "5"}, 2)
def selected_examples(llm: ChatMacaw) -> Runnable[Any, Any]:
    example = PromptTemplate.from_template("Q: {q}\nA: {a}")
    examples = [{"q": "1", "a": "2"}, {"q": "3", "a": "4"}]
    prompt = FewShotPromptTemplate(
        example_selector=LengthBasedExampleSelector(examples=examples, example_prompt=example, max_length=8),
        example_prompt=example,
        suffix="Q: {q}\nA:",
        input_variables=["q"],
    )
    return prompt | llm | TEXT | then(llm)


# -----------------------------------------------------------------------------------------------------------
# Branches, routes, maps on an answer


@case(X, 2)
def branch_on_an_answer(llm: ChatMacaw) -> Runnable[Any, Any]:
    branch = RunnableBranch((lambda text: "zzz" in text, chat("No {y}") | llm), chat("Yes {y}") | llm)
    return ask(llm) | branch | TEXT


@case({"x": "poem"}, 2)
def branch_on_the_input(llm: ChatMacaw) -> Runnable[Any, Any]:
    branch = RunnableBranch((lambda v: v["x"] == "poem", chat("Write {x}") | llm | TEXT), ask(llm))
    return branch | then(llm)


@case(X, 2)
def route_on_an_answer(llm: ChatMacaw) -> Runnable[Any, Any]:
    routes = RouterRunnable({"long": then(llm), "short": chat("Short {y}") | llm | TEXT})
    return (
        ask(llm) | {"key": lambda text: "long" if len(text) > 20 else "short", "input": RunnablePassthrough()} | routes
    )


@case(X, 4)
def map_on_an_answer(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm) | words | (chat("About {word}") | llm | TEXT).map()


@case(X, 8)
def map_of_two_stages_on_an_answer_and_reduce(llm: ChatMacaw) -> Runnable[Any, Any]:
    stages = (chat("About {word}") | llm | TEXT | chat("Shorter: {long}") | llm | TEXT).map()
    return {"all": ask(llm) | words | stages} | chat("{{#all}}{{{.}}};{{/all}}", "mustache") | llm


@case(X, 6)
def map_beside_a_chain(llm: ChatMacaw) -> Runnable[Any, Any]:
    return RunnableParallel(mapped=ask(llm) | words | (chat("About {word}") | llm).map(), other=ask(llm) | then(llm))


# -----------------------------------------------------------------------------------------------------------
# Fallbacks, retries, configurables, history


@case(X, 2)
def fallback_is_needed(llm: ChatMacaw) -> Runnable[Any, Any]:
    return (chat("{x} TOOLONG") | llm).with_fallbacks([chat("Instead {x}") | llm])


@case(X, 2)
def fallback_of_a_parser(llm: ChatMacaw) -> Runnable[Any, Any]:
    parser = PydanticOutputParser(pydantic_object=Facts)
    return (chat("Ask {x}") | llm | parser).with_fallbacks([chat("{x} as JSON") | llm | parser])


@case(X, 2)
def fallback_that_is_told(llm: ChatMacaw) -> Runnable[Any, Any]:
    failing = RunnablePassthrough.assign(y=ask(llm)) | RunnableLambda(fail)
    return failing.with_fallbacks([RunnablePick("x") | llm], exception_key="error")


@case(X, 2)
def fallback_is_not_needed(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm).with_fallbacks([then(llm)]) | str.strip | then(llm)


@case(X, 2)
def retry_of_a_function(llm: ChatMacaw) -> Runnable[Any, Any]:
    seen: set[str] = set()

    def flaky(text: str) -> str:
        if text not in seen:
            seen.add(text)
            raise ValueError("not yet")
        return text

    step = RunnableLambda(flaky).with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
    return ask(llm) | step | then(llm)


@case(X, 2)
def configured_alternative(llm: ChatMacaw) -> Runnable[Any, Any]:
    steps = (RunnableLambda(str.upper) | str.strip).configurable_alternatives(
        ConfigurableField(id="case"), default_key="upper", lower=RunnableLambda(str.lower)
    )
    return (ask(llm) | steps | then(llm)).with_config(configurable={"case": "lower"})


@case(X, 2)
def configured_model(llm: ChatMacaw) -> Runnable[Any, Any]:
    model = llm.configurable_fields(
        temperature=ConfigurableField(id="temperature"), max_tokens=ConfigurableField(id="max_tokens")
    )
    first = chat("Ask {x}") | model.with_config(configurable={"max_tokens": 3}) | TEXT
    return first | str.strip | chat("Then {y}") | model


@case({"question": "And then?"}, 1, sequential=True)
def message_history(llm: ChatMacaw) -> Runnable[Any, Any]:
    @functools.cache
    def history(session_id: str) -> InMemoryChatMessageHistory:
        return InMemoryChatMessageHistory(messages=[HumanMessage("hi"), AIMessage("ho")])

    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("history"), ("human", "{question}")])
    with_history = RunnableWithMessageHistory(
        prompt | llm, history, input_messages_key="question", history_messages_key="history"
    )
    return with_history.with_config(configurable={"session_id": "s"})


@case({"question": "And then?", "said": [HumanMessage("hi"), AIMessage("ho")]}, 2)
def conversation(llm: ChatMacaw) -> Runnable[Any, Any]:
    prompt = ChatPromptTemplate.from_messages([MessagesPlaceholder("said"), ("human", "{question}")])

    def remember(value: dict[str, Any]) -> list[BaseMessage]:
        return [*value["said"], HumanMessage(value["question"]), value["answer"], HumanMessage("Why?")]

    return RunnablePassthrough.assign(answer=prompt | llm) | remember | llm | TEXT


@case(X, 2)
def bound_and_tagged(llm: ChatMacaw) -> Runnable[Any, Any]:
    first = (ask(llm) | str.strip).with_config(run_name="first", tags=["a"], metadata={"m": 1})
    return first | chat("Then {y}") | llm.bind(stop=["END"], temperature=0.5).with_config(tags=["b"])


@case(CHUNKS, 6)
def map_reduce_by_a_function(llm: ChatMacaw) -> Runnable[Any, Any]:
    return {"all": map_summaries(llm) | "\n".join} | chat("Combine:\n{all}") | llm | TEXT


# -----------------------------------------------------------------------------------------------------------
# Failures


def fail(value: Any) -> Any:
    raise ValueError(f"no, not {value!r:.20}")


@case(X, 2, raises=True)
def failing_function(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm) | fail | then(llm)


@case(X, 1, raises=True)
def failing_model(llm: ChatMacaw) -> Runnable[Any, Any]:
    return ask(llm) | chat("{y} TOOLONG") | llm | TEXT | chat("Never {z}") | llm


@case(X, 1, raises=True)
def failing_parser(llm: ChatMacaw) -> Runnable[Any, Any]:
    return chat("Ask {x}") | llm | PydanticOutputParser(pydantic_object=Facts) | dict | chat("{name}") | llm


@case(X, 1, raises=True)
def missing_variable(llm: ChatMacaw) -> Runnable[Any, Any]:
    return RunnablePassthrough.assign(draft=ask(llm)) | chat("{draft} and {nothing}") | llm


@case({"key": "physics", "input": X}, 0, raises=True)
def unknown_route(llm: ChatMacaw) -> Runnable[Any, Any]:
    return RouterRunnable({"maths": ask(llm)}) | then(llm)


@case(X, 1, raises=True)
def failing_fallbacks(llm: ChatMacaw) -> Runnable[Any, Any]:
    return (chat("{x} TOOLONG") | llm).with_fallbacks([chat("Also {x} TOOLONG") | llm]) | TEXT


@case(X, 2, raises=True)
def failing_branch_of_a_parallel(llm: ChatMacaw) -> Runnable[Any, Any]:
    return RunnableParallel(a=ask(llm), b=ask(llm) | fail) | chat("{a} {b}") | llm
