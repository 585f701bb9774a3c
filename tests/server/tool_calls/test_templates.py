"""What chat templates make of tools; and conversations for those that know none."""

from __future__ import annotations

from typing import Any

import pytest

from macaw.protocol import ChatCompletionRequest
from macaw_server.programs.rendering import render, template_tools
from macaw_server.tool_calls import FORMATS
from server.programs.builders import byte_level_tokenizer

LIST = "{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}"
TURN = "[{{ m.role }}]{{ m.content }}"
CALL = "c.function.name | tojson"
ARGUMENTS = "c.function.arguments | tojson"
CALLS = {
    "hermes": f'<tool_call>\n{{"name": {{{{ {CALL} }}}}, "arguments": {{{{ {ARGUMENTS} }}}}}}\n</tool_call>',
    "llama3_json": f'{{"name": {{{{ {CALL} }}}}, "parameters": {{{{ {ARGUMENTS} }}}}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": {{{{ {CALL} }}}}, "arguments": {{{{ {ARGUMENTS} }}}}, '
    '"id": "{{ c.id }}"}]',
    "mistral_args": "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.function.name }}\n"
    "```json\n{{ '' + c.function.arguments }}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>"
    "{{ c.function.arguments | tojson }}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "granite": f'<|tool_call|>[{{"name": {{{{ {CALL} }}}}, "arguments": {{{{ {ARGUMENTS} }}}}}}]',
    "qwen3_coder": "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments | items %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>",
    "pythonic": "[{{ c.function.name }}({% for k, v in c.function.arguments | items %}{{ k }}={{ v | tojson }}"
    "{% endfor %})]",
}


def template(call: str, before: str = LIST, turn: str = TURN) -> str:
    return (
        f"{before}{{% for m in messages %}}{turn}{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}}{{% endfor %}}"
    )


def with_template(source: str) -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = source
    return tokenizer


WEATHER = {"name": "weather", "description": "Tells.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [
    {"type": "function", "function": {**WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]


def made(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [made("call_000000001", "weather", '{"é": [1]}'), made("call_000000002", "now", "")],
    },
    {"role": "tool", "tool_call_id": "call_000000001", "content": [{"type": "variable", "variable": "v"}]},
    {"role": "tool", "tool_call_id": "call_000000002", "content": "Noon"},
]


def text_of(tokenizer: Any, messages: list[dict[str, Any]] = MESSAGES, **fields: Any) -> str:
    request = ChatCompletionRequest.model_validate({"messages": messages, **fields})
    text = render(request, {"v": "Fog"}, tokenizer).text
    assert text is not None
    return text


@pytest.mark.parametrize("name", CALLS)
def test_the_form_of_calls_is_that_of_the_template(name: str) -> None:
    known = template_tools(with_template(template(CALLS[name])))
    assert (known.lists_tools, known.format, known.takes_system) == (True, FORMATS[name], True)


def test_every_form_has_a_template() -> None:
    assert CALLS.keys() == FORMATS.keys()


def test_a_template_that_fails_on_calls_is_known_by_its_source() -> None:
    assert template_tools(with_template(template("[TOOL_CALLS]{{ c.nothing.at_all }}"))).format == FORMATS["mistral"]


def test_a_form_that_nobody_knows() -> None:
    known = template_tools(with_template(template("CALL {{ c.function.name }}")))
    assert (known.lists_tools, known.format) == (True, None)


def test_templates_get_tools_and_arguments_as_objects() -> None:
    text = text_of(
        with_template(template(CALLS["hermes"], turn="[{{ m.role }} {{ m.name }}]{{ m.content }}")), tools=TOOLS
    )
    assert text.startswith(
        '[TOOLS][{"type": "function", "function": {"name": "weather", "description": "Tells.", "parameters": '
        '{"type": "object", "properties": {}}}}, {"type": "function", "function": {"name": "now", "parameters": '
        '{"type": "object", "properties": {}}}}]'
    )
    assert '{"name": "weather", "arguments": {"é": [1]}}' in text
    assert '{"name": "now", "arguments": {}}' in text
    assert "[tool weather]Fog[tool now]Noon" in text


def test_no_tools_are_told_of_where_none_may_be_called() -> None:
    tokenizer = with_template(template(CALLS["hermes"]))
    assert "[TOOLS]" not in text_of(tokenizer, tools=TOOLS, tool_choice="none")


def test_ids_are_cut_where_the_template_takes_short_ones_only() -> None:
    text = text_of(with_template(template(CALLS["mistral"], turn=TURN + "{{ m.tool_call_id }}")), tools=TOOLS)
    assert '"id": "000000001"' in text
    assert "Fog000000001[tool]Noon000000002" in text
    messages = [{"role": "assistant", "tool_calls": [made("call_7", "now", "{}")]}]
    assert '"id": "000call_7"' in text_of(with_template(template(CALLS["mistral"])), messages)


@pytest.mark.parametrize("arguments", ["[1]", "oops {", "[" * 5000])
def test_what_a_model_wrote_that_is_no_object_stays_as_it_is(arguments: str) -> None:
    messages = [{"role": "assistant", "content": "Hm", "tool_calls": [made("call_1", "f", arguments)]}]
    assert arguments in text_of(with_template(template(CALLS["hermes"])), messages)


def test_a_template_that_wants_arguments_as_text_gets_text() -> None:
    tokenizer = with_template(template(CALLS["deepseek_v3"]))
    assert template_tools(tokenizer).takes_text
    assert '```json\n{"é": [1]}\n```' in text_of(tokenizer, tools=TOOLS)


PLAIN = "{% for m in messages %}" + TURN + "\n{% endfor %}"
TOLD = """You may call one or more of these functions, given as JSON schemas:
<tools>
{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
</tools>
To call a function, write its name and its arguments as a JSON object between these tags:
<tool_call>
{"name": NAME, "arguments": ARGUMENTS}
</tool_call>"""
CALLED = """
[assistant]<tool_call>
{"name": "weather", "arguments": {"é": [1]}}
</tool_call>
<tool_call>
{"name": "now", "arguments": {}}
</tool_call>
[user]<tool_response>
Fog
</tool_response>
<tool_response>
Noon
</tool_response>
"""


def test_a_template_without_tools_is_told_of_them_by_messages() -> None:
    tokenizer = with_template(PLAIN)
    assert template_tools(tokenizer).format == FORMATS["hermes"]
    assert text_of(tokenizer, tools=TOOLS[1:]) == f"[system]{TOLD}\n[user]Hi{CALLED}"
    system = {"role": "developer", "content": "Be brief."}
    assert text_of(tokenizer, [system, *MESSAGES], tools=TOOLS[1:]) == f"[system]Be brief.\n\n{TOLD}\n[user]Hi{CALLED}"
    assert text_of(tokenizer) == f"[user]Hi{CALLED}", "calls are told without tools too"


def test_a_template_without_system_messages_is_told_by_the_user() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}" + PLAIN
    assert text_of(with_template(refusing), tools=TOOLS[1:]) == f"[user]{TOLD}\n\nHi{CALLED}"
