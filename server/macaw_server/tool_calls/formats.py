"""The forms in which families of models write calls; found by what a chat template makes of a call."""

from __future__ import annotations

import re

from .json_body import NAME, JsonBody
from .python_body import PythonBody
from .types import Markup, Schemas, ToolFormat
from .xml_body import XmlBody


def _object_header(keys: str) -> str:
    return rf'\s*\{{\s*"name"\s*:\s*"{NAME}"\s*,\s*"(?:{keys})"\s*:\s*(?=\{{)'


_CLOSE = r"\s*\}"
_HERMES_HEADER = _object_header("arguments|parameters")
_HERMES_END = r"\s*</tool_call>"
_LLAMA_HEADER = _object_header("parameters|arguments")
_LLAMA_NEXT = r"[ \t]*(?P<next>[;\n])\s*(?=\{)"
_MISTRAL_HEADER = (
    r"\s*\[?" + _object_header("arguments") + r"|\s*(?P<name>[\w.\-]{1,256})(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)"
)
_LIST_CLOSE = r'(?:\s*,\s*"id"\s*:\s*"[^"]*")?\s*\}'
_LIST_NEXT = r"\s*(?:(?P<next>,)\s*(?=\{)|\])"


def _hermes_body(schemas: Schemas) -> JsonBody:
    return JsonBody(_HERMES_HEADER, _CLOSE + _HERMES_END, _CLOSE, _HERMES_END)


def _llama_body(schemas: Schemas) -> JsonBody:
    return JsonBody(_LLAMA_HEADER, _CLOSE + _LLAMA_NEXT, _CLOSE, _LLAMA_NEXT)


def _mistral_body(schemas: Schemas) -> JsonBody:
    return JsonBody(_MISTRAL_HEADER, _LIST_CLOSE + _LIST_NEXT, _LIST_CLOSE)


def _granite_body(schemas: Schemas) -> JsonBody:
    return JsonBody(r"\s*\[?" + _HERMES_HEADER, _LIST_CLOSE + _LIST_NEXT, _LIST_CLOSE)


_HERMES_MARKUP = Markup(
    begin="<tool_call>",
    prefix='\n{"name": "{name}", "arguments": ',
    suffix="}\n</tool_call>",
    separator="\n<tool_call>",
)
_LLAMA_MARKUP = Markup(begin="", prefix='{"name": "{name}", "parameters": ', suffix="}", separator="; ", first_char="{")

HERMES = ToolFormat(
    name="hermes",
    begin="<tool_call>",
    body=_hermes_body,
    signature=r'<tool_call>\s*\{\s*"name"\s*:\s*"macaw_probe"',
    markup=_HERMES_MARKUP,
    markers=("<tool_call>", "</tool_call>"),
)
"""Hermes, Qwen 2.5 and 3, and many others. Also the form for models whose template knows no tools."""

FORMATS = {
    format.name: format
    for format in (
        HERMES,
        ToolFormat(
            name="qwen3_coder",
            begin="<tool_call>",
            start=r"\s*(?=<function=)",
            body=lambda schemas: XmlBody(schemas, _hermes_body(schemas)),
            signature=r"<function=macaw_probe>",
            markup=_HERMES_MARKUP,
            markers=("<tool_call>", "</tool_call>"),
        ),
        ToolFormat(
            name="llama3_json",
            begin="<|python_tag|>",
            start=r"\s*(?=\{)",
            body=_llama_body,
            signature=r'\{\s*"name"\s*:\s*"macaw_probe"\s*,\s*"parameters"',
            markup=_LLAMA_MARKUP,
            markers=("<|python_tag|>",),
        ),
        ToolFormat(
            name="mistral",
            begin="[TOOL_CALLS]",
            body=_mistral_body,
            signature=r'\[TOOL_CALLS\]\s*\[?\s*\{\s*"name"\s*:\s*"macaw_probe"',
            markup=Markup(
                begin="[TOOL_CALLS]",
                open="[",
                prefix='{"name": "{name}", "arguments": ',
                suffix="}",
                separator=", ",
                close="]",
            ),
            markers=("[TOOL_CALLS]",),
            id_len=9,
        ),
        ToolFormat(
            name="mistral_args",
            begin="[TOOL_CALLS]",
            body=_mistral_body,
            signature=r"\[TOOL_CALLS\]\s*macaw_probe",
            markup=Markup(begin="[TOOL_CALLS]", prefix="{name}[ARGS]", suffix="", separator="[TOOL_CALLS]"),
            markers=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
            id_len=9,
        ),
        ToolFormat(
            name="granite",
            begin="<|tool_call|>",
            body=_granite_body,
            signature=r'<\|tool_call\|>\s*\[?\s*\{\s*"name"\s*:\s*"macaw_probe"',
            markup=Markup(
                begin="<|tool_call|>",
                open="[",
                prefix='{"name": "{name}", "arguments": ',
                suffix="}",
                separator=", ",
                close="]",
            ),
            markers=("<|tool_call|>",),
        ),
        ToolFormat(
            name="pythonic",
            begin="<|python_start|>",
            start=r"\s*(?=\[\s*[A-Za-z_][\w.\-]*\(|\{)",
            body=lambda schemas: PythonBody(_llama_body(schemas)),
            signature=r"\[macaw_probe\(",
            markup=_LLAMA_MARKUP,
            markers=("<|python_start|>", "<|python_end|>"),
        ),
    )
}
"""By name, the more special before those whose signature they have too."""


def format_of(rendered: str) -> ToolFormat | None:
    """The format in whose form a chat template has written ``macaw_probe(macaw_argument="macaw_value")``."""
    return next((format for format in FORMATS.values() if re.search(format.signature, rendered)), None)
