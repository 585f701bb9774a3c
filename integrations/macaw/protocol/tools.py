"""OpenAI's tools on the wire: what a model may call, what it must, and the calls that it has made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from macaw.protocol.base import WireModel, depth_is_bounded

MAX_TOOLS = 1024
"""The largest accepted number of tools."""

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""What a function may be called; OpenAI's rule."""


class Function(WireModel):
    """A function that a model may call.

    Attributes:
        name: Unique in a request.
        description: When to call it; for the model.
        parameters: JSON schema of its arguments, an object. Without one it takes none.
        strict: The arguments are valid against `parameters` in every call, not just in those that are forced.
    """

    name: FunctionName
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(depth_is_bounded)] | None = None
    strict: bool | None = None


class Tool(WireModel):
    """A tool of the only type that is served."""

    type: Literal["function"]
    function: Function


class NamedFunction(WireModel):
    """A function by its name."""

    name: FunctionName


class NamedTool(WireModel):
    """As `tool_choice`: the model must call this function. In `allowed_tools`: it may."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(WireModel):
    """Some of a request's tools. With mode `auto` the model may call them, with `required` it must call one."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedToolsChoice(WireModel):
    """As `tool_choice`: all tools are in the prompt, so that it stays what the cache has, and some may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedToolsChoice, Field(discriminator="type")]
)


class FunctionCall(WireModel):
    """Which function was called; `arguments` are JSON as the model wrote it, so perhaps not valid."""

    name: Annotated[str, Field(min_length=1)]
    arguments: str


class ToolCall(WireModel):
    """A call in an assistant's message; a message of role `tool` answers it by its id."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall
