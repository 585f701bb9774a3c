"""The wire protocol: pydantic types shared by client and server.

OpenAI's chat completion request is the unit. A **call** is such a request in which text may also be a variable; a
**program** is calls, variables, transforms and targets. A field that is not listed here is refused by name, never
accepted and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_LOGPROBS = 20
"""The largest accepted `top_logprobs` (chat) or `logprobs` (completions)."""
MAX_CHOICES = 128
"""The largest accepted `n`."""
MAX_STOP_STRINGS = 16
"""The largest accepted number of stop strings."""

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.:\-/\[\]]+$")]
"""An identifier of a call, a variable or a transform."""


class WireModel(BaseModel):
    """Base of everything on the wire: unknown fields are refused, no silent type conversion."""

    model_config = ConfigDict(extra="forbid", strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Requests


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
    """A chat message. Adjacent parts are one string: no separator is added."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @property
    def parts(self) -> list[TextPart | VariablePart]:
        """The content as parts."""
        return [TextPart(text=self.content)] if isinstance(self.content, str) else list(self.content)


class StreamOptions(WireModel):
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(WireModel):
    """Only plain text for now: constrained decoding is refused by the type of this field."""

    type: Literal["text"]


class Hints(WireModel):
    """What a client without a program may say about the application that a request belongs to (field `macaw`).

    Attributes:
        app: The application run; requests with the same `app` are one program for the scheduler and in `/v1/programs`.
        group: Requests of one `app` with the same `group` are a task group: only the end of the last one matters.
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
    temperature: Annotated[float, Field(ge=0, le=2, strict=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=False)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, strict=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, strict=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, strict=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, strict=False)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, strict=False)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
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

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ChatCompletionRequest(GenerationRequest):
    """OpenAI's chat completion request."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None

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


# ---------------------------------------------------------------------------------------------------------------------
# Programs


class Variable(WireModel):
    """A semantic variable that the client produces: now (`value`) or later (`external`)."""

    value: str | None = None
    external: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Variable:
        if (self.value is None) != self.external:
            raise ValueError('a variable needs either "value": "text" now, or "external": true to be set later')
        return self


class Call(WireModel):
    """One LLM request whose output is a semantic variable (with `n` > 1: the text of the first choice)."""

    id: Name
    output: Name
    request: ChatCompletionRequest | CompletionRequest

    @field_validator("request", mode="wrap")
    @classmethod
    def _pick_kind(cls, value: Any, handler: Any) -> ChatCompletionRequest | CompletionRequest:
        """Decide by field, so that an error speaks of one kind of request only."""
        if isinstance(value, ChatCompletionRequest | CompletionRequest):
            return value
        if not isinstance(value, dict) or ("messages" in value) == ("prompt" in value):
            raise ValueError("a request is an object with either messages (chat) or prompt (text completion)")
        kind = ChatCompletionRequest if "messages" in value else CompletionRequest
        return kind.model_validate(value)

    @property
    def inputs(self) -> list[str]:
        """Names of the variables in the prompt, in order of first use."""
        return list(dict.fromkeys(p.variable for p in self.request.parts if isinstance(p, VariablePart)))


class JoinArgs(WireModel):
    """`join`: the inputs in order, with `separator` between; `strip` trims each, `drop_blank` leaves out blank ones."""

    separator: str = ""
    strip: bool = False
    drop_blank: bool = False


class NoArgs(WireModel):
    """`strip` and `html_escape` take no arguments."""


class JsonPointerArgs(WireModel):
    """`json_pointer` (RFC 6901): the string at `pointer` in the input read as JSON; other values as compact JSON."""

    pointer: str


class RegexArgs(WireModel):
    """`regex` (RE2 syntax): `group` of the first match of `pattern`; no match is an error."""

    pattern: Annotated[str, Field(max_length=1000)]
    group: Annotated[int, Field(ge=0, le=99)] = 0


class LinesArgs(WireModel):
    """`lines`: the lines `start:stop` of the input (Python slice rules), joined by newline."""

    start: int | None = None
    stop: int | None = None
    drop_blank: bool = False


TransformArgs = JoinArgs | NoArgs | JsonPointerArgs | RegexArgs | LinesArgs
TransformOp = Literal["join", "strip", "html_escape", "json_pointer", "regex", "lines"]
_ARGS: dict[str, type[WireModel]] = {
    "join": JoinArgs,
    "strip": NoArgs,
    "html_escape": NoArgs,
    "json_pointer": JsonPointerArgs,
    "regex": RegexArgs,
    "lines": LinesArgs,
}


class Transform(WireModel):
    """A pure text function between variables, run on the server; all but `join` take exactly one input."""

    id: Name
    op: TransformOp
    inputs: Annotated[list[Name], Field(min_length=1)]
    output: Name
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _args_fit_op(self) -> Transform:
        if self.op != "join" and len(self.inputs) != 1:
            raise ValueError(f"{self.op} takes exactly one input, {len(self.inputs)} were given")
        _ = self.typed_args
        return self

    @property
    def typed_args(self) -> TransformArgs:
        """`args` as the type that belongs to `op`."""
        args: Any = _ARGS[self.op].model_validate(self.args)
        return args  # type: ignore[no-any-return]


class Target(WireModel):
    """A variable that the application waits for.

    Attributes:
        variable: Its name.
        objective: `latency` (default) or `throughput`.
        deadline_ms: Milliseconds from the program's creation after which the answer is worthless: the program is
            then cancelled with `deadline_exceeded`.
    """

    variable: Name
    objective: Literal["latency", "throughput"] = "latency"
    deadline_ms: Annotated[float, Field(gt=0, strict=False)] | None = None


class ProgramGrowth(WireModel):
    """Body of ``POST /v1/programs/{id}/calls``: more of the graph. `close` ends an open program's growth."""

    variables: dict[Name, Variable] = Field(default_factory=dict)
    calls: list[Call] = Field(default_factory=list)
    transforms: list[Transform] = Field(default_factory=list)
    targets: list[Target] = Field(default_factory=list)
    close: bool = False


class ProgramRequest(WireModel):
    """Body of ``POST /v1/programs``.

    Attributes:
        model: The served model that calls without a `model` of their own use.
        variables: Variables that the client produces, by name.
        calls: The LLM calls.
        transforms: Server-side text functions.
        targets: What the application waits for.
        stream: Answer with server-sent events rather than once at the end.
        open: Stay alive after the targets are resolved, until a growth says `close`.
        detached: Keep running when the client's stream breaks.
        max_concurrency: At most so many calls of this program run at once.
        metadata: Free-form labels, shown by ``GET /v1/programs/{id}``.
        idempotency_key: A second post with the same key (and API key) joins the first one's program.
    """

    model: str | None = None
    variables: dict[Name, Variable] = Field(default_factory=dict)
    calls: list[Call] = Field(default_factory=list)
    transforms: list[Transform] = Field(default_factory=list)
    targets: list[Target] = Field(default_factory=list)
    stream: bool = False
    open: bool = False
    detached: bool = False
    max_concurrency: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    idempotency_key: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class VariableValue(WireModel):
    """Body of ``PUT /v1/programs/{id}/variables/{name}``."""

    value: str


# ---------------------------------------------------------------------------------------------------------------------
# Events


class CallTimings(WireModel):
    """When a call did what, in milliseconds since its program was created; None where it never came so far."""

    ready_ms: float | None = None
    started_ms: float | None = None
    first_token_ms: float | None = None
    completed_ms: float | None = None


class ErrorBody(WireModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str


class Totals(WireModel):
    """Sums over a program's calls; `computed_tokens` are the prompt tokens that were not found in the cache."""

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    completion_tokens: int = 0


class Event(WireModel):
    """Base of the events of a program's stream; `sequence` counts from 0 and is the SSE id."""

    sequence: int = 0


class ProgramCreated(Event):
    """First event of every program."""

    type: Literal["program.created"] = "program.created"
    program_id: str


class CallStarted(Event):
    """The engine took the call into a batch."""

    type: Literal["call.started"] = "call.started"
    call_id: str
    queue_ms: float
    prompt_tokens: int
    cached_tokens: int


class CallDelta(Event):
    """New text of a call; `chunk` is an OpenAI (chat) completion chunk."""

    type: Literal["call.delta"] = "call.delta"
    call_id: str
    chunk: dict[str, Any]


class CallCompleted(Event):
    """The whole answer of a call; `completion` is an OpenAI (chat) completion with usage."""

    type: Literal["call.completed"] = "call.completed"
    call_id: str
    completion: dict[str, Any]
    timings: CallTimings


class CallFailed(Event):
    """The call has no answer; so have its consumers."""

    type: Literal["call.failed"] = "call.failed"
    call_id: str
    error: ErrorBody
    timings: CallTimings


class VariableResolved(Event):
    """A variable has its value."""

    type: Literal["variable.resolved"] = "variable.resolved"
    variable: str
    value: str


class ProgramCompleted(Event):
    """All targets are resolved. `critical_path`: the calls that determined the end, first to last."""

    type: Literal["program.completed"] = "program.completed"
    program_id: str
    variables: dict[str, str]
    critical_path: list[str]
    totals: Totals
    duration_ms: float


class ProgramFailed(Event):
    """At least one target cannot be resolved; `variables` holds those that were."""

    type: Literal["program.failed"] = "program.failed"
    program_id: str
    error: ErrorBody
    variables: dict[str, str]
    totals: Totals
    duration_ms: float


AnyEvent = Annotated[
    ProgramCreated
    | CallStarted
    | CallDelta
    | CallCompleted
    | CallFailed
    | VariableResolved
    | ProgramCompleted
    | ProgramFailed,
    Field(discriminator="type"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Answers


class CallState(WireModel):
    """A call in ``GET /v1/programs/{id}`` and in the answer of a program without a stream."""

    id: str
    status: Literal["waiting", "ready", "running", "completed", "failed"]
    inputs: list[str]
    output: str
    depth: int
    group: str | None = None
    timings: CallTimings
    completion: dict[str, Any] | None = None
    error: ErrorBody | None = None


class ProgramState(WireModel):
    """Answer of ``GET /v1/programs/{id}`` and of ``POST /v1/programs`` with ``stream: false``."""

    id: str
    status: Literal["running", "completed", "failed"]
    model: str
    calls: list[CallState]
    transforms: list[Transform]
    targets: list[Target]
    variables: dict[str, str]
    error: ErrorBody | None = None
    critical_path: list[str]
    totals: Totals
    duration_ms: float
    metadata: dict[str, str]
