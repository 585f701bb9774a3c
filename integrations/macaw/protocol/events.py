"""The events of a program's stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from macaw.errors import MacawError, error_from_wire
from macaw.protocol.base import WireModel


class CallTimings(WireModel):
    """When a call did what, in milliseconds since its program was created; None where it never got there.

    Attributes:
        ahead_ms: Its prompt began to be prefilled, before it was ready.
        ready_ms: All its inputs were there.
        started_ms: The engine took it into a batch.
        first_token_ms: The first piece of its answer.
        completed_ms: The end.
        prefilled_ahead_tokens: Cached tokens of its prompt that had been computed ahead.
        ahead_saved_ms: What computing these takes, estimated; the call did not wait for it.
    """

    ahead_ms: float | None = None
    ready_ms: float | None = None
    started_ms: float | None = None
    first_token_ms: float | None = None
    completed_ms: float | None = None
    prefilled_ahead_tokens: int = 0
    ahead_saved_ms: float = 0.0


class ErrorBody(WireModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str

    def to_exception(self) -> MacawError:
        """The exception that this object stands for."""
        return error_from_wire(self.model_dump())


class Totals(WireModel):
    """Sums over a program's calls; `computed_tokens` are the prompt tokens that were not in the cache."""

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
    prefilled_ahead_tokens: int = 0


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
