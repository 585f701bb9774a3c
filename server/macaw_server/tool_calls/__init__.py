"""Tool calls: how families of models write them, as parsers of streams and as grammars. Pure: text in, text out."""

from macaw_server.tool_calls.formats import FORMATS, HERMES, format_of
from macaw_server.tool_calls.grammar import CallRules, lark
from macaw_server.tool_calls.stream import Call, ToolCallStream, collected, parse
from macaw_server.tool_calls.templates import RENDER_ERRORS, TemplateTools, inspect_template, without_tools
from macaw_server.tool_calls.types import Arguments, CallStart, Content, Piece, Schemas, ToolFormat

__all__ = [
    "FORMATS",
    "HERMES",
    "RENDER_ERRORS",
    "Arguments",
    "Call",
    "CallRules",
    "CallStart",
    "Content",
    "Piece",
    "Schemas",
    "TemplateTools",
    "ToolCallStream",
    "ToolFormat",
    "collected",
    "format_of",
    "inspect_template",
    "lark",
    "parse",
    "without_tools",
]
