"""What a server tells of its work to those who record it: lengths, times and shapes, and no text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from macaw.protocol.base import WireModel


class TraceStarted(WireModel):
    """The first event of ``GET /v1/trace``.

    Attributes:
        tenant: Whose calls follow; the same in all recordings of a tenant.
        block_size: Tokens that one number stands for.
        now_ms: On the clock of all times that follow, which is the same for all recordings.
    """

    type: Literal["trace.started"] = "trace.started"
    tenant: str
    block_size: int
    now_ms: float


class TracedCall(WireModel):
    """A call that ran and has ended. Times are milliseconds.

    A block's number stands for its tokens and for all before them, under a key that only this recording has: equal
    numbers are equal beginnings of prompts, and nothing else can be read from them.

    Attributes:
        program: Id of its program, or of the application that its request belongs to by its hints.
        kind: What `program` is: posted as one, an application of hinted requests, or one request by itself.
        node: Name of the call, unique in `program`.
        app: What the client calls its application, if it does.
        arrival_ms: When its program came.
        ready_ms: When all that it waits for was there.
        ended_ms: When it ended.
        deps: Calls of `program` whose answers it reads.
        prompt_tokens: Of its prompt.
        cached_tokens: Of these, found in the cache.
        output_tokens: Of each choice; where it failed, what there was.
        blocks: A number for each block of the prompt; the last block may be shorter.
        answer: One for each block that the first choice's answer filled.
        objective: Of its program's targets.
        deadline_ms: Of these, from the program's arrival.
        error: Code of why it failed.
    """

    type: Literal["trace.call"] = "trace.call"
    program: str
    kind: Literal["program", "application", "request"]
    node: str
    app: str | None = None
    arrival_ms: float
    ready_ms: float
    ended_ms: float
    deps: list[str]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: list[int]
    blocks: list[int]
    answer: list[int]
    objective: Literal["latency", "throughput"]
    deadline_ms: float | None = None
    error: str | None = None


class TraceLost(WireModel):
    """The reader was too slow for the server to keep everything.

    Attributes:
        num_calls: That are missing here.
    """

    type: Literal["trace.lost"] = "trace.lost"
    num_calls: int


TraceEvent = Annotated[TraceStarted | TracedCall | TraceLost, Field(discriminator="type")]
TRACE_EVENT: TypeAdapter[TraceStarted | TracedCall | TraceLost] = TypeAdapter(TraceEvent)
"""Reads the data of one event."""
