"""The nouns of the scheduler: a sequence, a chunk of it, a batch of chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from macaw_server.engine.types import EngineRequest, FinishReason
from macaw_server.kvcache import Allocation
from macaw_server.scheduler.speculation import Drafter


class SequenceStatus(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    BLOCKED = "blocked"
    """Waiting for another one that computes the prefix they share."""
    RUNNING = "running"
    FINISHED = "finished"
    """Came to its end or was aborted."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step.

    Attributes:
        max_num_seqs: Sequences that hold pages at one time.
        max_num_batched_tokens: Token budget of one step; at least `max_num_seqs`, so that every decode has a
            place.
        max_model_len: Prompt plus output of a sequence, in tokens.
        max_prefill_chunk: Prompt tokens of one sequence in one step; None leaves it to the budget.
        max_draft_tokens: Draft tokens of one sequence in one step; 0 is no speculation.
        ridge: Rows of a step that cost as much as the step does without any; see `speculation`.
        latency_slowdown: While latency-critical sequences decode, others make a step at most so many times longer
            than it would be with these alone.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_prefill_chunk: int | None = None
    max_draft_tokens: int = 0
    ridge: float = 8.0
    latency_slowdown: float = 3.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs is {self.max_num_seqs} and max_num_batched_tokens "
                f"{self.max_num_batched_tokens}; the first must be at least 1 and at most the second, "
                "so that every sequence can decode in each step."
            )
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len of {self.max_model_len} leaves no output; it must be at least 2.")
        if self.latency_slowdown < 1:
            raise ValueError(f"latency_slowdown of {self.latency_slowdown} is no slowdown; it must be at least 1.")
        if self.max_prefill_chunk is not None and self.max_prefill_chunk < 1:
            raise ValueError(f"max_prefill_chunk of {self.max_prefill_chunk} is no progress; it must be at least 1.")


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way through the engine.

    Attributes:
        request: As it came.
        arrival_s: When the call became ready, on the scheduler's clock.
        latest_start_s: When it has to start to meet its program's deadline.
        number: Counts requests in the order in which they were added; the last word between equals.
        token_ids: Prompt and output so far.
        status: See there.
        finish_reason: Set when it came to its end.
        allocation: Its pages while it is running.
        cached_tokens: Prompt tokens found in the cache when it first entered a batch.
        num_preemptions: How often it lost its pages.
        num_charged: Tokens from the front that count as served: those computed again are not charged again.
        drafter: Guesses its next tokens; made when it first decodes, if there is speculation.
    """

    request: EngineRequest
    arrival_s: float
    number: int
    latest_start_s: float = math.inf
    token_ids: list[int] = field(init=False)
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    allocation: Allocation | None = None
    cached_tokens: int | None = None
    num_preemptions: int = 0
    num_charged: int = 0
    drafter: Drafter | None = None

    def __post_init__(self) -> None:
        self.token_ids = self.request.prompt_ids + self.request.output_ids

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def pages(self) -> Allocation:
        """Its pages; only while it is running."""
        assert self.allocation is not None, f"{self.request_id} is {self.status.value} and holds no pages"
        return self.allocation

    @property
    def block_table(self) -> list[int]:
        """Its pages in order; only while it is running."""
        return self.pages.block_table

    @property
    def num_computed(self) -> int:
        """Tokens whose K/V is in its pages, those of the batch that was scheduled last included."""
        return 0 if self.allocation is None else self.allocation.num_computed

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be run; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_outputs(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.request.prompt_ids)


class ScheduledChunk(NamedTuple):
    """Tokens ``[start, start + length)`` of a sequence, to be run in this step, and drafts to follow them.

    Attributes:
        sequence: Whose; its block table covers the chunk, drafts included.
        start: Position of the first token.
        length: Number of tokens.
        samples: Whether the chunk ends with the sequence's last token, so that the next one is sampled.
        drafts: Tokens that may come next, to be verified: each of them gets a sample too. None of them stops
            the sequence or takes its last place, so only the last token that is accepted can end it.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        """What to run."""
        return [*self.sequence.token_ids[self.start : self.start + self.length], *self.drafts]

    @property
    def num_samples(self) -> int:
        """Rows, the last ones of the chunk, from which a token is sampled."""
        return 1 + len(self.drafts) if self.samples else 0


@dataclass(slots=True)
class ScheduledBatch:
    """What to run in one step.

    Attributes:
        chunks: At most one for each sequence. A chunk reads pages that earlier steps, or earlier chunks,
            compute.
        admitted: Sequences that enter a batch for the first time: their `cached_tokens` is news.
        preempted: Sequences that lost their pages for the sake of others.
    """

    chunks: list[ScheduledChunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks, drafts included."""
        return sum(chunk.length + len(chunk.drafts) for chunk in self.chunks)
