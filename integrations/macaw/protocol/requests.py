"""OpenAI's requests as Macaw accepts them; inside a program, text may also be a variable."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator, with_config
from typing_extensions import TypedDict

from macaw.protocol.base import WireModel, depth_is_bounded, refuse_field
from macaw.protocol.tools import MAX_TOOLS, Tool, ToolCall, ToolChoice

MAX_LOGPROBS = 20
"""The largest accepted `top_logprobs` (chat) or `logprobs` (completions)."""
MAX_CHOICES = 128
"""The largest accepted `n`."""
MAX_STOP_STRINGS = 16
"""The largest accepted number of stop strings."""

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.:\-/\[\]]+$")]
"""An identifier of a call, a variable or a transform."""


class TextPart(WireModel):
    """Constant text."""

    type: Literal["text"] = "text"
    text: str


class VariablePart(WireModel):
    """The value of a semantic variable; only valid inside a program."""

    type: Literal["variable"] = "variable"
    variable: Name


Part = Annotated[TextPart | VariablePart, Field(discriminator="type")]


class Message(WireModel):
    """A chat message. Adjacent parts are one string: no separator is added.

    Attributes:
        role: Who says it; `tool` is the answer of a function.
        content: Only an assistant's message with `tool_calls` may be without.
        name: Of the one who says it, for templates that show it.
        tool_calls: What an assistant has called.
        tool_call_id: The call that a message of role `tool` answers.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fields_fit_role(self) -> Message:
        if self.tool_calls is not None and self.role != "assistant":
            refuse_field("tool_calls", f"a message of role {self.role} calls no tools; only an assistant's does")
        if self.content is None and self.tool_calls is None:
            if "content" in self.model_fields_set:
                refuse_field("content", "null was given; only an assistant's message with tool_calls has none")
            refuse_field("content", "is missing")
        if self.role == "tool" and self.tool_call_id is None:
            refuse_field("tool_call_id", "is missing; a message of role tool says which call it answers")
        if self.role != "tool" and self.tool_call_id is not None:
            refuse_field("tool_call_id", f"a message of role {self.role} answers no call; only one of role tool does")
        return self

    @property
    def parts(self) -> list[TextPart | VariablePart]:
        """The content as parts."""
        if isinstance(self.content, str):
            return [TextPart(text=self.content)]
        return list(self.content or [])


class StreamOptions(WireModel):
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


@with_config(ConfigDict(extra="forbid", strict=True))
class JsonSchema(TypedDict):
    """OpenAI's `response_format.json_schema`. The output matches `schema` whether or not `strict` is set.

    `name` and `description` label it: like the schema itself, the model does not see them. (A dict, as a model could
    not have a field of the name `schema`.)
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: NotRequired[str | None]
    schema: Annotated[dict[str, Any], AfterValidator(depth_is_bounded)]
    strict: NotRequired[bool | None]


class ResponseFormat(WireModel):
    """OpenAI's `response_format`: free text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(f"type {self.type} is {'without' if self.json_schema is None else 'with'} a json_schema")
        return self


class StructuredOutputs(WireModel):
    """What else an output can be held to, as in vLLM; exactly one field.

    Attributes:
        regex: It matches as a whole. Rust's syntax: no look-around, no back-references.
        choice: It is one of these.
        grammar: It matches a grammar in llguidance's variant of Lark.
    """

    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("exactly one of regex, choice and grammar is accepted")
        return self


class Hints(WireModel):
    """What a client without a program may say about the application of a request (field `macaw`).

    Attributes:
        app: The application run; requests with the same `app` are one program for the scheduler and in
            `/v1/programs`.
        group: Requests of one `app` with the same `group` are a task group: only the end of the last matters.
        group_size: How many requests the group will have.
        stage: How deep in the application this request is; 0 comes first.
        objective: What the application waits for.
    """

    app: Annotated[str, Field(max_length=256)] | None = None
    group: Annotated[str, Field(max_length=256)] | None = None
    group_size: Annotated[int, Field(ge=1)] | None = None
    stage: Annotated[int, Field(ge=0)] | None = None
    objective: Literal["latency", "throughput"] | None = None


class GenerationRequest(WireModel):
    """The fields that chat and text completions share; ranges are OpenAI's where OpenAI has the field."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None
    macaw: Hints | None = None

    @field_validator("stop")
    @classmethod
    def _stop_is_usable(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > MAX_STOP_STRINGS:
            raise ValueError(f"{len(strings)} stop strings; at most {MAX_STOP_STRINGS} are accepted")
        if any(not s for s in strings):
            raise ValueError("an empty stop string would stop before the first token; leave it out")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _bias_keys_are_token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or {}:
            if not key.isascii() or not key.isdigit():
                raise ValueError(f"key {key!r} is not a token id")
        return bias

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only accepted with stream: true")
        return self

    @model_validator(mode="after")
    def _one_constraint(self) -> GenerationRequest:
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("response_format and structured_outputs both say what the output must be; send one")
        return self

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ChatCompletionRequest(GenerationRequest):
    """OpenAI's chat completion request."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only accepted with logprobs: true")
        return self

    @property
    def parts(self) -> list[TextPart | VariablePart]:
        """Every part of every message, in order."""
        return [part for message in self.messages for part in message.parts]


class CompletionRequest(GenerationRequest):
    """OpenAI's text completion request. Inside a program `prompt` is a list of parts."""

    prompt: (
        str
        | Annotated[list[Part], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[list[int]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def parts(self) -> list[TextPart | VariablePart]:
        """The prompt as parts; a prompt of token ids or several prompts has none."""
        if isinstance(self.prompt, str):
            return [TextPart(text=self.prompt)]
        return [part for part in self.prompt if isinstance(part, TextPart | VariablePart)]
