"""Chains to compare compiled and native execution on. All their calls are known ahead: one program each.

Chains with client steps are in `chain_corpus_steps`, chains of documents and legacy ones in
`chain_corpus_documents`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import (
    ChatPromptTemplate,
    FewShotChatMessagePromptTemplate,
    FewShotPromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
)
from langchain_core.runnables import (
    ConfigurableField,
    RouterRunnable,
    Runnable,
    RunnableParallel,
    RunnablePassthrough,
    RunnablePick,
)

from langchain_macaw import ChatMacaw

TEXT = StrOutputParser()
CHUNKS = [{"text": f"chunk {i} of {{braces}} & <tags>"} for i in range(5)]


@dataclass(frozen=True)
class Case:
    """A chain, an input for it, and how many calls it makes.

    Attributes:
        static: All calls are known ahead: the chain is one program request.
        raises: It ends in an exception. Which calls come before that is a matter of chance.
        sequential: Its runs read what earlier ones left behind, so they cannot be compared side by side.
    """

    name: str
    build: Callable[[ChatMacaw], Runnable[Any, Any]]
    input: Any
    num_calls: int
    static: bool = True
    raises: bool = False
    sequential: bool = False


def chat(template: str, template_format: Any = "f-string") -> ChatPromptTemplate:
    return ChatPromptTemplate.from_messages([("human", template)], template_format=template_format)


def map_summaries(llm: ChatMacaw) -> Runnable[Any, Any]:
    return (ChatPromptTemplate.from_template("Summarise this part:\n\n{text}") | llm | TEXT).map()


def map_reduce_mustache(llm: ChatMacaw) -> Runnable[Any, Any]:
    combine = "Combine these summaries:\n\n{{#summaries}}- {{{.}}}\n{{/summaries}}"
    return {"summaries": map_summaries(llm)} | chat(combine, "mustache") | llm | TEXT


def map_reduce_jinja2(llm: ChatMacaw) -> Runnable[Any, Any]:
    lines = "{% for s in summaries %}{{ loop.index }}. {{ s }}\n{% endfor %}"
    combine = f"Combine:\n{lines}{{{{ summaries | join('; ') }}}}"
    return {"summaries": map_summaries(llm)} | chat(combine, "jinja2") | llm | TEXT


def parallel(llm: ChatMacaw) -> Runnable[Any, Any]:
    branches = {f"d{i}": chat(f"Aspect {i} of {{topic}}") | llm | TEXT for i in range(3)}
    return RunnableParallel(branches) | chat("{d0} / {d1} / {d2}") | llm | TEXT


def chain_of_three(llm: ChatMacaw) -> Runnable[Any, Any]:
    draft = chat("Draft: {topic}") | llm | TEXT
    return draft | chat("Criticise: {draft}") | llm | TEXT | chat("Improve: {criticism}") | llm


def assign(llm: ChatMacaw) -> Runnable[Any, Any]:
    return (
        RunnablePassthrough.assign(draft=chat("Draft: {topic}") | llm | TEXT)
        | RunnablePassthrough.assign(final=chat("Improve: {draft} on {topic}") | llm | TEXT)
        | RunnablePick(["draft", "final"])
    )


def gather(llm: ChatMacaw) -> Runnable[Any, Any]:
    return {"topic": itemgetter("topic"), "all": RunnablePassthrough()} | chat("{topic}: {all}") | llm | TEXT


def history(llm: ChatMacaw) -> Runnable[Any, Any]:
    prompt = ChatPromptTemplate.from_messages(
        [
            ("system", "Be {mood}."),
            MessagesPlaceholder("history"),
            ("placeholder", "{more}"),
            ("human", "{question}"),
        ]
    )
    return prompt | llm


def message_list(llm: ChatMacaw) -> Runnable[Any, Any]:
    second = ChatPromptTemplate.from_messages([("human", "Ask."), MessagesPlaceholder("said"), ("human", "Go on.")])
    return {"said": (chat("Say {word}") | llm).map()} | second | llm | TEXT


def few_shot(llm: ChatMacaw) -> Runnable[Any, Any]:
    example = PromptTemplate.from_template("Q: {q}\nA: {a}")
    prompt = FewShotPromptTemplate(
        examples=[{"q": "1", "a": "2"}, {"q": "3", "a": "4"}],
        example_prompt=example,
        prefix="Continue.",
        suffix="Q: {q}\nA:",
        input_variables=["q"],
    )
    return prompt | llm | TEXT | {"q": RunnablePassthrough()} | prompt | llm | TEXT


def few_shot_chat(llm: ChatMacaw) -> Runnable[Any, Any]:
    examples = FewShotChatMessagePromptTemplate(
        examples=[{"q": "1", "a": "2"}],
        example_prompt=ChatPromptTemplate.from_messages([("human", "{q}"), ("ai", "{a}")]),
    )
    prompt = ChatPromptTemplate.from_messages([("system", "Count."), examples, ("human", "{q}")])
    return prompt | llm | TEXT | prompt | llm | TEXT


def partials(llm: ChatMacaw) -> Runnable[Any, Any]:
    prompt = chat("{language}: {draft} {date}").partial(language="French", date=lambda: "today")
    return chat("Draft {topic}") | llm | TEXT | prompt | llm | TEXT


def bound(llm: ChatMacaw) -> Runnable[Any, Any]:
    first = chat("Short: {topic}") | llm.bind(stop=["END"], max_tokens=4, top_k=5)
    return first.with_config(run_name="first", tags=["t"]) | TEXT | chat("Long: {x}") | llm.bind(temperature=0.7) | TEXT


def escaped(llm: ChatMacaw) -> Runnable[Any, Any]:
    return chat("Draft: {topic}") | llm | TEXT | chat("Escaped: {{x}} raw: {{{x}}}", "mustache") | llm | TEXT


def mustache_sections(llm: ChatMacaw) -> Runnable[Any, Any]:
    template = "{{#items}}{{name}}: {{{text}}}\n{{/items}}{{^items}}nothing{{/items}}"
    items = RunnablePassthrough.assign(text=chat("About {name}") | llm | TEXT).map()
    return {"items": items} | chat(template, "mustache") | llm


def jinja2_conditions(llm: ChatMacaw) -> Runnable[Any, Any]:
    template = "{% if draft %}Improve {{ draft }}{% else %}Nothing{% endif %} {{ 'x' ~ draft }} {{ topic | upper }}"
    return RunnablePassthrough.assign(draft=chat("Draft: {topic}") | llm | TEXT) | chat(template, "jinja2") | llm | TEXT


def duplicates(llm: ChatMacaw) -> Runnable[Any, Any]:
    same = chat("Same: {topic}") | llm | TEXT
    return RunnableParallel(a=same, b=same, c=same) | chat("{a}{b}{c}") | llm | TEXT


def string_in(llm: ChatMacaw) -> Runnable[Any, Any]:
    return llm | TEXT | llm | TEXT


def list_content(llm: ChatMacaw) -> Runnable[Any, Any]:
    prompt = ChatPromptTemplate.from_messages(
        [("human", [{"type": "text", "text": "Part one: {x}"}, {"type": "text", "text": " part two: {x}"}])]
    )
    return prompt | llm | TEXT | prompt | llm


def nested_map(llm: ChatMacaw) -> Runnable[Any, Any]:
    inner = (
        {"parts": (chat("Part: {x}") | llm | TEXT).map()}
        | chat("{{#parts}}{{{.}}},{{/parts}}", "mustache")
        | llm
        | TEXT
    )
    return inner.map() | {"all": RunnablePassthrough()} | chat("{% for a in all %}{{a}}|{% endfor %}", "jinja2") | llm


def string_prompt(llm: ChatMacaw) -> Runnable[Any, Any]:
    return PromptTemplate.from_template("Plain {x}") | llm | TEXT | PromptTemplate.from_template("Again {x!s}") | llm


def one_prompt_two_models(llm: ChatMacaw) -> Runnable[Any, Any]:
    other = llm.model_copy(update={"temperature": 1.5})
    return chat("Q: {q}") | llm | TEXT | chat("Judge: {a}") | RunnableParallel(cold=llm, hot=other)


def with_retry_and_fallbacks(llm: ChatMacaw) -> Runnable[Any, Any]:
    first = (chat("Try {x}") | llm).with_retry(stop_after_attempt=2) | TEXT
    return first | chat("Then {y}") | llm.with_fallbacks([llm.bind(temperature=1)]) | TEXT


def configurable(llm: ChatMacaw) -> Runnable[Any, Any]:
    field = llm.configurable_fields(temperature=ConfigurableField(id="temperature"))
    alternatives = chat("Be nice: {x}").configurable_alternatives(
        ConfigurableField(id="tone"), default_key="nice", rude=chat("Be rude: {x}")
    )
    chain = alternatives | field | TEXT | chat("Again: {y}") | llm | TEXT
    return chain.with_config(configurable={"temperature": 0.3, "tone": "rude"})


def router(llm: ChatMacaw) -> Runnable[Any, Any]:
    routes = {"maths": chat("Calculate {x}") | llm, "poem": chat("Write {x}") | llm}
    return RouterRunnable(routes) | TEXT | chat("Check {y}") | llm


def one_call(llm: ChatMacaw) -> Runnable[Any, Any]:
    return chat("Only {x}") | llm | TEXT


def constant_prompt(llm: ChatMacaw) -> Runnable[Any, Any]:
    prompt = ChatPromptTemplate.from_messages([SystemMessage("Fixed."), HumanMessage("Also fixed.")])
    return prompt | llm | TEXT | chat("Reword: {x}") | llm


def side_function(llm: ChatMacaw) -> Runnable[Any, Any]:
    """A passthrough with a function on the side passes its input through."""
    return RunnablePassthrough(lambda x: None) | chat("Q {x}") | llm | TEXT | chat("R {y}") | llm


TOPIC = {"topic": "parrots"}
CASES = [
    Case("map_reduce_mustache", map_reduce_mustache, CHUNKS, 6),
    Case("map_reduce_jinja2", map_reduce_jinja2, CHUNKS, 6),
    Case("parallel", parallel, TOPIC, 4),
    Case("chain_of_three", chain_of_three, TOPIC, 3),
    Case("assign", assign, TOPIC, 2),
    Case("gather", gather, TOPIC, 1),
    Case(
        "history",
        history,
        {"mood": "kind", "history": [HumanMessage("hi"), AIMessage("ho")], "question": "what?"},
        1,
    ),
    Case("message_list", message_list, [{"word": "a"}, {"word": "b"}], 3),
    Case("few_shot", few_shot, {"q": "5"}, 2),
    Case("few_shot_chat", few_shot_chat, {"q": "5"}, 2),
    Case("partials", partials, TOPIC, 2),
    Case("bound", bound, TOPIC, 2),
    Case("escaped", escaped, TOPIC, 2),
    Case("mustache_sections", mustache_sections, [{"name": "a"}, {"name": "b"}], 3),
    Case("jinja2_conditions", jinja2_conditions, TOPIC, 2),
    Case("duplicates", duplicates, TOPIC, 4),
    Case("string_in", string_in, "Hello?", 2),
    Case("list_content", list_content, {"x": "y"}, 2),
    Case("nested_map", nested_map, [[{"x": "1"}, {"x": "2"}], [{"x": "3"}]], 6),
    Case("string_prompt", string_prompt, {"x": "1"}, 2),
    Case("one_prompt_two_models", one_prompt_two_models, {"q": "1"}, 3),
    Case("with_retry_and_fallbacks", with_retry_and_fallbacks, {"x": "1"}, 2),
    Case("configurable", configurable, {"x": "1"}, 2),
    Case("router", router, {"key": "maths", "input": {"x": "1"}}, 2),
    Case("one_call", one_call, {"x": "1"}, 1),
    Case("constant_prompt", constant_prompt, {}, 2),
    Case("side_function", side_function, {"x": "1"}, 2),
]
