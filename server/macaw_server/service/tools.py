"""The tools of a request: whether they make sense, what may be called, and how the answer is to be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, NoReturn

from macaw.errors import InvalidRequestError
from macaw.protocol import (
    AllowedToolsChoice,
    ChatCompletionRequest,
    CompletionRequest,
    Function,
    NamedTool,
    ResponseFormat,
)
from macaw_server.errors import ConfigError
from macaw_server.programs.rendering import template_tools
from macaw_server.service.types import ServedModel
from macaw_server.tool_calls import FORMATS, HERMES, CallRules, Schemas, ToolCallStream, ToolFormat

_COMBINING = frozenset(("allOf", "anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties", "if"))
_LENIENT = {"lenient": True, "whitespace_pattern": r"[ \t\n\r]{0,32}"}
_STRICT = {**_LENIENT, "lenient": False}


class Offered(NamedTuple):
    """A function that the answer may call, and its place among the request's tools."""

    position: int
    function: Function


class ToolUse(NamedTuple):
    """How a request uses tools.

    Attributes:
        mode: Calls are free (`auto`), or there is nothing else (`required`).
        callable: What may be called.
        several: More than one call.
        needs_grammar: Parsing alone does not do what the request asks for.
        format: In which calls are written.
        special: Ids of the format's markers that are special tokens.
        hidden: All other special tokens, which have no text, where there are such markers; else none.
    """

    mode: Literal["auto", "required"]
    callable: list[Offered]
    several: bool
    needs_grammar: bool
    format: ToolFormat
    special: Mapping[str, int]
    hidden: frozenset[int]

    @property
    def schemas(self) -> Schemas:
        """Of the functions' arguments, as the request has them."""
        return {entry.function.name: entry.function.parameters or {} for entry in self.callable}

    def reader(self) -> ToolCallStream:
        """Reads one answer."""
        return ToolCallStream(self.format, self.schemas, None if self.several else 1)

    def rules(self, content: Mapping[str, Any] | None) -> CallRules:
        """For a grammar; `content` is the schema of answers that are no calls."""
        schemas = {entry.function.name: arguments_schema(entry.function) for entry in self.callable}
        free = self.mode == "auto"
        with_options = None if content is None or not free else {"x-guidance": _STRICT, **content}
        return CallRules(schemas, self.several, free=free, content=with_options)


def tool_use(request: ChatCompletionRequest | CompletionRequest, model: ServedModel) -> ToolUse | None:
    """How a request that was checked uses tools; None where its answer is text."""
    if isinstance(request, CompletionRequest) or not request.tools or request.tool_choice == "none":
        return None
    everything = [Offered(i, tool.function) for i, tool in enumerate(request.tools)]
    mode: Literal["auto", "required"] = "auto"
    chosen = everything
    match request.tool_choice:
        case "required":
            mode = "required"
        case NamedTool(function=named):
            mode, chosen = "required", [entry for entry in everything if entry.function.name == named.name]
        case AllowedToolsChoice(allowed_tools=allowed):
            names = {tool.function.name for tool in allowed.tools}
            mode, chosen = allowed.mode, [entry for entry in everything if entry.function.name in names]
    one = isinstance(request.tool_choice, NamedTool) or request.parallel_tool_calls is False
    needs_grammar = (
        mode == "required"
        or len(chosen) < len(everything)
        or any(entry.function.strict for entry in chosen)
        or (request.response_format is not None and request.response_format.type != "text")
    )
    format = tool_format(model)
    assert format is not None, "the request was not checked"
    tokens = special_tokens(model)
    special = {marker: tokens[marker] for marker in format.markers if marker in tokens}
    hidden = frozenset(tokens.values()) - frozenset(special.values()) if special else frozenset[int]()
    return ToolUse(mode, chosen, not one, needs_grammar, format, special, hidden)


def tool_format(model: ServedModel) -> ToolFormat | None:
    """The form in which a model writes calls; None where neither its template nor the operator says."""
    if model.tool_call_parser is not None:
        return FORMATS[model.tool_call_parser]
    return template_tools(model.tokenizer).format


def check_parser(model: ServedModel) -> None:
    """Refuse a form of calls that the model is never told of.

    Raises:
        ConfigError: Its template lists no tools, so calls are written as the system message for that case says.
    """
    name = model.tool_call_parser
    if name not in (None, HERMES.name) and not template_tools(model.tokenizer).lists_tools:
        raise ConfigError(
            f"--tool-call-parser {name}: the chat template of model {model.name!r} lists no tools, so Macaw tells of "
            f"them, and of calls in the form of {HERMES.name}. Leave the flag out."
        )


@lru_cache(maxsize=16)
def special_tokens(model: ServedModel) -> dict[str, int]:
    """Ids of the tokens that have no text."""
    added = getattr(model.tokenizer, "added_tokens_decoder", {})
    return {token.content: id_ for id_, token in added.items() if token.special}


def check_tools(request: ChatCompletionRequest | CompletionRequest, model: ServedModel) -> None:
    """Refuse tools, and messages about calls, that do not fit each other or the model.

    Raises:
        InvalidRequestError: `param` is the path of the offending field.
    """
    if isinstance(request, CompletionRequest):
        return
    _check_messages(request)
    if request.tools is None:
        for field, value in (
            ("tool_choice", request.tool_choice),
            ("parallel_tool_calls", request.parallel_tool_calls),
        ):
            if value is not None and value != "none":
                _refuse(field, "says how tools are called, and there are no tools. Send tools, or leave it out")
        return
    names: dict[str, int] = {}
    for i, tool in enumerate(request.tools):
        function = tool.function
        if (first := names.setdefault(function.name, i)) != i:
            _refuse(
                f"tools[{i}].function.name",
                f"is {function.name!r}, and so is that of tools[{first}]. Rename one of them",
            )
        _check_parameters(function, f"tools[{i}].function.parameters")
    for path, name in _chosen_names(request):
        if name not in names:
            _refuse(path, f"is {name!r}, and no tool has this name. Accepted: {', '.join(map(repr, names))}")
    if request.tool_choice == "none":
        return
    if request.structured_outputs is not None:
        _refuse(
            "structured_outputs",
            "says what the answer must be, and so do tools. Send response_format, or tool_choice: none",
        )
    if tool_format(model) is None:
        raise InvalidRequestError(
            f"tools: the chat template of model {model.name!r} lists tools, but the form in which it has calls written "
            f"is not known. Serve it with --tool-call-parser, one of {', '.join(FORMATS)}; or leave tools out.",
            code="unsupported_parameter",
            param="tools",
        )


def arguments_schema(function: Function) -> dict[str, Any]:
    """The schema that a grammar enforces, with llguidance's options.

    A function takes what it declares: where nothing is said of other properties there are none. What of a schema that
    is not `strict` cannot be enforced is left out.
    """
    schema = function.parameters
    if schema is None:
        schema = {"properties": {}}
    closed = {"additionalProperties": False} if "properties" in schema and not _COMBINING & schema.keys() else {}
    return {"x-guidance": _STRICT if function.strict else _LENIENT, "type": "object", **schema, **closed}


def content_schema(format: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema of an answer that calls nothing; None where anything goes."""
    if format is None or format.type == "text":
        return None
    return {"type": "object"} if format.json_schema is None else format.json_schema["schema"]


def _check_messages(request: ChatCompletionRequest) -> None:
    """An answer of a tool is one to a call that was made before."""
    known: set[str] = set()
    for i, message in enumerate(request.messages):
        known |= {call.id for call in message.tool_calls or ()}
        if message.tool_call_id is not None and message.tool_call_id not in known:
            _refuse(
                f"messages[{i}].tool_call_id",
                f"is {message.tool_call_id!r}, and no message before has a call with this id. Send the assistant's "
                "message with its tool_calls too",
            )


def _check_parameters(function: Function, path: str) -> None:
    schema = function.parameters or {}
    if schema.get("type", "object") != "object":
        _refuse(path, f"has type {schema['type']!r}. Arguments are an object: declare them as its properties")
    if not isinstance(schema.get("properties", {}), dict):
        _refuse(path, "has properties that are no object. Give each argument a schema by its name")
    if "x-guidance" in schema:
        _refuse(path, 'has "x-guidance", whose options are the server\'s. Leave it out')


def _chosen_names(request: ChatCompletionRequest) -> Iterator[tuple[str, str]]:
    match request.tool_choice:
        case NamedTool(function=named):
            yield "tool_choice.function.name", named.name
        case AllowedToolsChoice(allowed_tools=allowed):
            for i, tool in enumerate(allowed.tools):
                yield f"tool_choice.allowed_tools.tools[{i}].function.name", tool.function.name


def _refuse(field: str, why: str) -> NoReturn:
    raise InvalidRequestError(f"{field} {why}.", param=field)
