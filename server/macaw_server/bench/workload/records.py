"""What the client saw of a program, and of a whole run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from macaw_server.workloads import ProgramSpec


@dataclass(slots=True)
class Outcome:
    """One program, as its client saw it; seconds from the start of the run.

    Attributes:
        spec: What was asked for.
        started_s: When the client began.
        first_token_s: When the first token of a target was there; 0 before.
        ended_s: When all targets were there.
        num_requests: HTTP requests.
        prompt_tokens, cached_tokens, output_tokens: Over all calls, by the server's account.
        answers: Of the targets, by call.
        program_id: On the server; of the last program, where it was one.
    """

    spec: ProgramSpec
    started_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0
    num_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    answers: dict[str, str] = field(default_factory=dict)
    program_id: str | None = None

    @property
    def latency_s(self) -> float:
        """From the arrival to the last target."""
        return self.ended_s - self.spec.arrival_s

    @property
    def token_ms(self) -> float:
        """Latency over the output tokens of the whole program (normalized latency)."""
        return 1000 * self.latency_s / sum(call.output_len for call in self.spec.calls)

    def add_usage(self, usage: dict[str, Any]) -> None:
        """Count the `usage` of one answer."""
        self.prompt_tokens += usage["prompt_tokens"]
        self.output_tokens += usage["completion_tokens"]
        self.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def as_json(self) -> dict[str, Any]:
        """Without texts."""
        return {
            "id": self.spec.id,
            "app": self.spec.app,
            "arrival_s": self.spec.arrival_s,
            "first_token_s": self.first_token_s,
            "ended_s": self.ended_s,
            "num_requests": self.num_requests,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
        }


@dataclass(frozen=True, slots=True)
class Run:
    """One side's run of a workload.

    Attributes:
        outcomes: In order of arrival.
        timeline: Of the slowest program, as SVG; empty where the side sends requests.
    """

    outcomes: list[Outcome]
    timeline: str = ""

    @property
    def apps(self) -> list[str]:
        """Names, in order of their first programs."""
        return list(dict.fromkeys(outcome.spec.app.partition("/")[0] for outcome in self.outcomes))

    def of(self, app: str) -> list[Outcome]:
        """The programs of one app."""
        return [outcome for outcome in self.outcomes if outcome.spec.app.partition("/")[0] == app]
