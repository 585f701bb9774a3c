"""OpenAI's request fields that Macaw knows and does not serve: refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

_FUNCTIONS = "OpenAI has replaced it: send tools and tool_choice"
_TEXT_ONLY = "Macaw serves text only"
_HOSTED = "It is a feature of OpenAI's own service"

_GENERATION = {
    "service_tier": _HOSTED,
    "safety_identifier": _HOSTED + "; user takes an identifier",
    "prompt_cache_key": "Prefixes are cached without it",
    "prompt_cache_retention": "Prefixes are cached without it",
    "guided_json": "response_format takes a schema",
    "guided_regex": "structured_outputs takes a regex",
    "guided_choice": "structured_outputs takes a choice",
    "guided_grammar": "structured_outputs takes a grammar",
}
_CHAT = _GENERATION | {
    "functions": _FUNCTIONS,
    "function_call": _FUNCTIONS,
    "audio": _TEXT_ONLY,
    "modalities": _TEXT_ONLY,
    "prediction": "Predicted outputs are not served",
    "reasoning_effort": "The effort is the model's own",
    "verbosity": "The length is the model's own; max_tokens bounds it",
    "web_search_options": _HOSTED,
    "moderation": _HOSTED,
    "store": _HOSTED,
    "metadata": "Labels belong to a program: metadata of POST /v1/programs",
}
_COMPLETION = _GENERATION | {
    "echo": "The prompt is not repeated",
    "suffix": "Text is only continued, not filled in",
    "best_of": "Ask for n answers and pick one",
}
_MESSAGE = {
    "function_call": "OpenAI has replaced it: send tool_calls",
    "refusal": "Say it in content",
    "audio": _TEXT_ONLY,
}


class Refusal(NamedTuple):
    """A field that is not served: its path, and a message."""

    path: str
    message: str


def find_unsupported(request: dict[str, Any], prefix: str = "") -> Iterator[Refusal]:
    """The fields of an OpenAI request that ask for something that is not served.

    Fields that are known, not served, and *not used* (null, or false for a switch) are taken out of it.

    Args:
        request: Parsed JSON.
        prefix: Path of the request, with a dot at its end.
    """
    chat = "messages" in request
    unused_best_of = request.get("best_of") == (request.get("n") or 1)
    if not chat and unused_best_of:
        del request["best_of"]
    yield from _used(request, _CHAT if chat else _COMPLETION, prefix)
    options = request.get("stream_options")
    if isinstance(options, dict) and options.get("include_obfuscation"):
        yield _refusal(f"{prefix}stream_options.include_obfuscation", True, "Chunks are not padded")
    if chat:
        yield from _unsupported_tools(request, prefix)
    messages = request.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else []):
        if isinstance(message, dict):
            yield from _unsupported_in_message(message, f"{prefix}messages[{i}]")


def _unsupported_tools(request: dict[str, Any], prefix: str) -> Iterator[Refusal]:
    tools = request.get("tools")
    for i, tool in enumerate(tools if isinstance(tools, list) else []):
        if isinstance(tool, dict) and isinstance(kind := tool.get("type"), str) and kind != "function":
            yield _refusal(f"{prefix}tools[{i}].type", kind, "Tools are of type function")
    choice = request.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "custom":
        yield _refusal(f"{prefix}tool_choice.type", "custom", "Tools are of type function")


def _unsupported_in_message(message: dict[str, Any], path: str) -> Iterator[Refusal]:
    yield from _used(message, _MESSAGE, f"{path}.")
    if message.get("role") == "function":
        yield _refusal(f"{path}.role", message["role"], "OpenAI has replaced it: send role tool with a tool_call_id")
    content = message.get("content")
    for i, part in enumerate(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(kind := part.get("type"), str) and kind not in ("text", "variable"):
            yield _refusal(f"{path}.content[{i}].type", kind, f"{_TEXT_ONLY}: parts of type text")


def _used(fields: dict[str, Any], table: dict[str, str], prefix: str) -> Iterator[Refusal]:
    for name in table.keys() & fields.keys():
        value = fields[name]
        if value is None or value is False:
            del fields[name]
        else:
            yield _refusal(f"{prefix}{name}", value, table[name])


def _refusal(path: str, value: object, why: str) -> Refusal:
    shown = repr(value) if isinstance(value, str | bool | int | float) else f"an {type(value).__name__}"
    shown = {"an dict": "an object", "an list": "a list"}.get(shown, shown)
    return Refusal(path, f"{path}: {shown} was given, which is not supported. {why}. Leave the field out.")
