"""Templates under stand-ins: what becomes parts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.prompts import PromptTemplate

from langchain_macaw.sentinel import NotStatic, StandIns, Variable, mustache_escape
from langchain_macaw.templates import Text, request_template
from macaw.protocol import TextPart, VariablePart


def lowered(template: str, template_format: Any, values: dict[str, Any]) -> tuple[TextPart | VariablePart, ...]:
    """The parts of a prompt that is made of `template`."""
    prompt = PromptTemplate.from_template(template, template_format=template_format)

    def payload(stand_ins: StandIns) -> dict[str, Any]:
        return {"messages": [{"content": prompt.format(**stand_ins.fill(values))}]}

    content = request_template(payload, (StandIns(6), StandIns(9))).body["messages"][0]["content"]
    return content.parts if isinstance(content, Text) else (TextPart(text=content),)


X = Variable("x")
STATIC = [
    ("f-string", "a {x} b", "a $x b"),
    ("f-string", "{x!s}{x}", "$x$x"),
    ("f-string", "{{x}} {x}", "{x} $x"),
    ("jinja2", "{{ x }}", "$x"),
    ("jinja2", "{{ x ~ '!' }}", "$x!"),
    ("jinja2", "{% if x %}yes {{ x }}{% endif %}", "yes $x"),
    ("jinja2", "{% for i in l %}{{ loop.index }}={{ i }} {% endfor %}", "1=$x 2=$x "),
    ("jinja2", "{{ l | join(',') }} {{ l | length }}", "$x,$x 2"),
    ("jinja2", "{{ known | upper }} {{ x }}", "KNOWN $x"),
    ("mustache", "{{{x}}} {{&x}}", "$x $x"),
    ("mustache", "{{x}}", "$x.html"),
    ("mustache", "{{#l}}[{{{.}}}]{{/l}}", "[$x][$x]"),
    ("mustache", "{{#x}}yes{{/x}}{{^x}}no{{/x}}", "yes"),
    ("mustache", "{{#d}}{{{x}}}{{/d}}", "$x"),
]


@pytest.mark.parametrize(("template_format", "template", "expected"), STATIC)
def test_moved_text_becomes_parts(template_format: str, template: str, expected: str) -> None:
    parts = lowered(template, template_format, {"x": X, "l": [X, X], "known": "known", "d": {"x": X}})
    assert "".join(p.text if isinstance(p, TextPart) else f"${p.variable}" for p in parts) == expected


REFUSED = [
    ("f-string", "{x:>9}"),
    ("f-string", "{x!r}"),
    ("jinja2", "{{ x | upper }}"),
    ("jinja2", "{{ x | length }}"),
    ("jinja2", "{{ x | trim }}"),
    ("jinja2", "{{ x | e }}"),
    ("jinja2", "{{ x | safe }}"),
    ("jinja2", "{{ x.replace('&', '&amp;') }}"),
    ("jinja2", "{{ x[0] }}"),
    ("jinja2", "{{ x.strip() }}"),
    ("jinja2", "{{ x == 'yes' }}"),
    ("jinja2", "{{ x < 'yes' }}"),
    ("jinja2", "{{ 'a' in x }}"),
    ("jinja2", "{{ x in ['a'] }}"),
    ("jinja2", "{{ x * 2 }}"),
    ("jinja2", "{% for c in x %}{{ c }}{% endfor %}"),
    ("jinja2", "{{ {x: 1} }}"),
    ("jinja2", "{{ (x ~ 'b') | upper }}"),
    ("jinja2", "{{ (x ~ 'b') | length }}"),
    ("jinja2", "{{ (x ~ 'b')[:12] }}"),
]


@pytest.mark.parametrize(("template_format", "template"), REFUSED)
def test_read_text_is_refused(template_format: str, template: str) -> None:
    with pytest.raises(NotStatic):
        lowered(template, template_format, {"x": X})


@given(text=st.text())
def test_escape_is_mustaches(text: str) -> None:
    assert mustache_escape(text) == PromptTemplate.from_template("{{x}}", template_format="mustache").format(x=text)


NAMES = ["a", "b", "c"]
# What a stand-in is made of is legal in texts, too.
TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\ue000\ue001:aZ04{}\n&<")))
PIECE = st.one_of(st.sampled_from(NAMES).map(Variable), TEXT)


@given(pieces=st.lists(PIECE), values=st.fixed_dictionaries(dict.fromkeys(NAMES, TEXT)))
def test_parts_give_what_the_template_gives(pieces: list[Any], values: dict[str, str]) -> None:
    """Whatever the constant text is, filling the parts in is formatting with the values."""
    prompt = PromptTemplate.from_template(
        "".join(f"{{{p.name}}}" if isinstance(p, Variable) else p.replace("{", "{{").replace("}", "}}") for p in pieces)
    )

    def payload(stand_ins: StandIns) -> dict[str, Any]:
        return {"content": prompt.format(**stand_ins.fill({name: Variable(name) for name in NAMES}))}

    content = request_template(payload, (StandIns(6), StandIns(9))).body["content"]
    filled = content.with_values(values) if isinstance(content, Text) else content
    assert filled == prompt.format(**values)
