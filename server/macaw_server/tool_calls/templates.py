"""What a model's chat template does with tools, and conversations for templates that know none.

A template is asked by having it render a conversation with a tool and a call: what is in the text, it knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2

from .formats import FORMATS, HERMES, format_of
from .types import ToolFormat

RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError)
"""What a template raises over messages that it was not made for."""

_PROBE_ID = "macaw0000"
_PROBE_CALL = {
    "id": _PROBE_ID,
    "type": "function",
    "function": {"name": "macaw_probe", "arguments": {"macaw_argument": "macaw_value"}},
}
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "macaw_probe",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"macaw_argument": {"type": "string", "description": "A value."}},
            "required": ["macaw_argument"],
        },
    },
}
_USER = {"role": "user", "content": "Go."}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
_ANSWER = {"role": "tool", "name": "macaw_probe", "tool_call_id": _PROBE_ID, "content": "macaw_answer"}


@dataclass(frozen=True, slots=True)
class TemplateTools:
    """What a chat template makes of tools.

    Attributes:
        lists_tools: The text has what is passed as `tools`.
        format: The form in which it writes calls; None where that is not known.
    """

    lists_tools: bool
    format: ToolFormat | None


@lru_cache(maxsize=64)
def inspect_template(apply: Callable[..., Any], template: str) -> TemplateTools:
    """What a template makes of tools.

    Args:
        apply: The tokenizer's `apply_chat_template`.
        template: Its source, by which the answer is remembered.
    """
    listed = _rendered(apply, [_USER])
    if "macaw_probe" not in listed:
        return TemplateTools(False, HERMES)
    called = _rendered(apply, [_USER, _CALLING, _ANSWER]) or _rendered(apply, [_USER, _CALLING])
    format = format_of(called)
    if format is None:  # it may want something that the probe has not; its source names the marker all the same
        format = next((f for f in FORMATS.values() if f.begin in template), None)
    return TemplateTools(True, format)


def _rendered(apply: Callable[..., Any], messages: list[dict[str, Any]]) -> str:
    try:
        text: str = apply(messages, tools=[_PROBE_TOOL], tokenize=False, add_generation_prompt=True)
    except RENDER_ERRORS:
        return ""
    return text


def without_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation that says with system, user and assistant messages what its tools and calls say.

    The tools are listed at the end of the system message, or in one of their own. Calls are in the text of the
    assistant, and answers in that of the user, neighbours in one message.
    """
    told: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            answer = f"<tool_response>\n{message['content']}\n</tool_response>"
            if told and told[-1].get("answers"):
                told[-1]["content"] += f"\n{answer}"
            else:
                told.append({"role": "user", "content": answer, "answers": True})
        elif calls := message.get("tool_calls"):
            lines = [message["content"]] if message["content"] else []
            lines += [f"<tool_call>\n{_call_text(call['function'])}\n</tool_call>" for call in calls]
            told.append(
                {key: value for key, value in message.items() if key != "tool_calls"} | {"content": "\n".join(lines)}
            )
        else:
            told.append(message)
    told = [{key: value for key, value in message.items() if key != "answers"} for message in told]
    if not tools:
        return told
    first = told[0] if told and told[0]["role"] == "system" else None
    text = instructions(tools) if first is None else f"{first['content']}\n\n{instructions(tools)}"
    return [{"role": "system", "content": text}, *told[0 if first is None else 1 :]]


def instructions(tools: list[dict[str, Any]]) -> str:
    """The text that tells a model of its tools, and how to call them."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You may call one or more of these functions, given as JSON schemas:\n"
        f"<tools>\n{listed}\n</tools>\n"
        "To call a function, write its name and its arguments as a JSON object between these tags:\n"
        '<tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call>'
    )


def _call_text(function: dict[str, Any]) -> str:
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
