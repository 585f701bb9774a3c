"""What a run leaves behind: times of calls and programs."""

from __future__ import annotations

from dataclasses import dataclass, field

from macaw_server.workloads import ProgramSpec


@dataclass(slots=True)
class CallRecord:
    """What happened to one call; seconds from the start of the run.

    Attributes:
        prompt_len: Tokens.
        output_len: Tokens.
        ready_s: When the server could have begun.
        started_s: When it first was in a batch.
        first_token_s: When its first token was there.
        ended_s: When its last token was there.
        cached_tokens: Of the prompt, found in the cache.
        shared_tokens: Of the prompt, in a cache that forgets nothing.
    """

    prompt_len: int
    output_len: int
    ready_s: float
    started_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0
    cached_tokens: int = 0
    shared_tokens: int = 0


@dataclass(slots=True)
class ProgramRecord:
    """What happened to one program.

    Attributes:
        spec: What was asked for.
        calls: By id, in the order in which they became ready.
        ended_s: When the client had its answers, or knew that there will be none.
        error: Why it failed: an error code.
    """

    spec: ProgramSpec
    calls: dict[str, CallRecord] = field(default_factory=dict)
    ended_s: float = 0.0
    error: str | None = None

    @property
    def latency_s(self) -> float:
        """From the arrival to the last target, client time and round trips included."""
        return self.ended_s - self.spec.arrival_s


@dataclass(slots=True)
class RunResult:
    """What a run has brought.

    Attributes:
        programs: In order of their ends.
        duration_s: From the start to the last end, on the run's own clock.
        num_steps, num_preemptions, num_evicted_pages: Of all engines.
        num_scheduled: Calls that were scheduled.
        decision_s: Real time that scheduling took, placement included.
        wall_s: Real time that the run took.
    """

    programs: list[ProgramRecord] = field(default_factory=list)
    duration_s: float = 0.0
    num_steps: int = 0
    num_preemptions: int = 0
    num_evicted_pages: int = 0
    num_scheduled: int = 0
    decision_s: float = 0.0
    wall_s: float = 0.0
