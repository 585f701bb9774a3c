"""Programs as the client sends them: variables, calls, transforms, targets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from macaw.protocol.base import WireModel
from macaw.protocol.requests import ChatCompletionRequest, CompletionRequest, Name, VariablePart


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
    """`join`: the inputs with `separator` between; `strip` trims each, `drop_blank` leaves out blank ones."""

    separator: str = ""
    strip: bool = False
    drop_blank: bool = False


class NoArgs(WireModel):
    """`strip` and `html_escape` take no arguments."""


class JsonPointerArgs(WireModel):
    """`json_pointer` (RFC 6901): the string at `pointer` in the input read as JSON; else compact JSON."""

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
        deadline_ms: Milliseconds from the program's creation after which the answer is worthless: the program
            is then cancelled with `deadline_exceeded`.
    """

    variable: Name
    objective: Literal["latency", "throughput"] = "latency"
    deadline_ms: Annotated[float, Field(gt=0)] | None = None


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
        deltas: Whose answers come piece by piece: of all calls, of those whose output is a target, or of none.
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
    deltas: Literal["all", "targets", "none"] = "all"
    open: bool = False
    detached: bool = False
    max_concurrency: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    idempotency_key: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class VariableValue(WireModel):
    """Body of ``PUT /v1/programs/{id}/variables/{name}``."""

    value: str
