"""A call of a program and what is known of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from macaw.errors import MacawError
from macaw.protocol import Call, CallState, CallTimings, ErrorBody
from macaw_server.engine.types import CallClass


class Ahead(NamedTuple):
    """What was prefilled of a call before it was ready.

    Attributes:
        start_ms: When that began.
        num_tokens: Cached tokens of its prompt that were computed so.
        saved_ms: What computing them takes, estimated.
    """

    start_ms: float
    num_tokens: int
    saved_ms: float


@dataclass(slots=True)
class CallNode:
    """A call of a program, and how far it is.

    Attributes:
        call: What the client sent.
        index: Position among the program's calls.
        status: `waiting` for inputs, `ready`, `running` (handed out), `completed` or `failed`.
        depth: Calls before it on its longest path.
        call_class: What the application waits for here; deduced anew when the program grows.
        group: Task group within the program, if any.
        path_tokens: Estimate of the output tokens on the longest path from here to the end of the program.
        deadline_ms: Of the targets behind it, from the program's start.
        timings: Milliseconds since the program was created.
        prompt_tokens: Known when the call has started.
        cached_tokens: Prompt tokens that were found in the cache.
        completion_tokens: Known when the call has completed.
        completion: The whole OpenAI (chat) completion.
        error: Why it failed.
    """

    call: Call
    index: int
    status: Literal["waiting", "ready", "running", "completed", "failed"] = "waiting"
    depth: int = 0
    call_class: CallClass = CallClass.BACKGROUND
    group: str | None = None
    path_tokens: float = 0.0
    deadline_ms: float = math.inf
    timings: CallTimings = field(default_factory=CallTimings)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    completion: dict[str, Any] | None = None
    error: MacawError | None = None

    def state(self) -> CallState:
        """What a client is told of it."""
        return CallState(
            id=self.call.id,
            status=self.status,
            inputs=self.call.inputs,
            output=self.call.output,
            depth=self.depth,
            group=self.group,
            timings=self.timings.model_copy(),
            completion=self.completion,
            error=error_body(self.error) if self.error else None,
        )


class Slack(NamedTuple):
    """A target's deadline, from the program's start, and what its longest path of calls takes at least from now."""

    deadline_ms: float
    needed_ms: float


def error_body(error: MacawError) -> ErrorBody:
    """An error as the protocol has it."""
    return ErrorBody(**error.to_wire())
