"""Messages and tools as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from macaw.protocol import ChatCompletionRequest, Message, TextPart, ToolCall, VariablePart


def joined(parts: Sequence[TextPart | VariablePart], values: Mapping[str, str]) -> str:
    """Parts as one text."""
    return "".join(part.text if isinstance(part, TextPart) else values[part.variable] for part in parts)


def template_messages(
    messages: Sequence[Message], values: Mapping[str, str], id_len: int | None = None
) -> list[dict[str, Any]]:
    """The messages of a request. An answer to a call gets the function's name, which some templates show.

    Args:
        messages: The request's.
        values: Of the variables in them.
        id_len: Ids of calls are cut to their last characters, for a template that takes no others.
    """
    functions: dict[str, str] = {}
    result = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        entry: dict[str, Any] = {"role": role, "content": joined(message.parts, values)}
        name = message.name
        if message.tool_calls is not None:
            functions |= {call.id: call.function.name for call in message.tool_calls}
            entry["tool_calls"] = [_template_call(call, id_len) for call in message.tool_calls]
        if message.tool_call_id is not None:
            name = name or functions.get(message.tool_call_id)
            entry["tool_call_id"] = _cut(message.tool_call_id, id_len)
        result.append(entry if name is None else {**entry, "name": name})
    return result


def tool_list(request: ChatCompletionRequest) -> list[dict[str, Any]]:
    """The tools that the model is told of, in the request's order: none where it may not call any.

    `strict` is left out: it is for the server, and models were not trained on it.
    """
    if request.tool_choice == "none":
        return []
    tools = []
    for tool in request.tools or ():
        function = tool.function
        description = {} if function.description is None else {"description": function.description}
        parameters = function.parameters or {"type": "object", "properties": {}}
        tools.append({"type": "function", "function": {"name": function.name, **description, "parameters": parameters}})
    return tools


def _template_call(call: ToolCall, id_len: int | None) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
    return {"id": _cut(call.id, id_len), "type": call.type, "function": function}


def _arguments(text: str) -> Any:
    """An object, as templates expect it; what the model wrote that is none stays as it is."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text


def _cut(call_id: str, id_len: int | None) -> str:
    return call_id if id_len is None else call_id[-id_len:]
