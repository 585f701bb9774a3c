"""The nouns on the boundary of the engine: what goes in, what comes out. Token ids only; picklable, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol

FinishReason = Literal["stop", "length"]
PublicPrefixes = Sequence[Sequence[int]]
"""Tokens of the texts that the operator has declared public."""


class CallClass(IntEnum):
    """What the application waits for; the smaller value goes first."""

    LATENCY = 0
    GROUP = 1
    BACKGROUND = 2
    AHEAD = 3
    """Work that nobody may ever need: it takes what the others leave."""


class Reuse(NamedTuple):
    """A prefix of a call's prompt and answer with which a call to come of its program begins.

    Attributes:
        num_tokens: About how long; None is all of both.
        steps: Calls until that one.
    """

    num_tokens: int | None
    steps: int


@dataclass(frozen=True, slots=True)
class CallHints:
    """What the scheduler knows of a request's application.

    Attributes:
        program_id: Requests with the same id belong together.
        call_class: Deduced from the program's targets.
        depth: Calls before this one on its longest path.
        group: Name of the task group within the program, if any.
        arrival_s: When the call became ready, monotonic seconds of the server process.
        tenant: Whose it is; tenants share an engine by `tenant_weight`.
        tenant_weight: Above 0.
        work_tokens: Estimate of the output tokens that the program still needs, over all of its calls; None where it
            may grow or nothing is known.
        path_tokens: The same on the longest path from this call on, this one included.
        deadline_s: When its program's answer is worthless; same clock as `arrival_s`.
        reuse: What its program will need again; that is kept as long as possible, until `Engine.let_go`.
        may_return: Whether nobody can tell if it will be gone on from, as with a request without a program.
    """

    program_id: str = ""
    call_class: CallClass = CallClass.LATENCY
    depth: int = 0
    group: str | None = None
    arrival_s: float = 0.0
    tenant: str = ""
    tenant_weight: float = 1.0
    work_tokens: float | None = None
    path_tokens: float | None = None
    deadline_s: float = math.inf
    reuse: tuple[Reuse, ...] = ()
    may_return: bool = True


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    Attributes:
        max_tokens: Output length limit in tokens.
        temperature: 0 is greedy.
        top_p: Nucleus mass; 1 is off.
        top_k: Candidates kept; 0 is off.
        min_p: Floor relative to the most likely token; 0 is off.
        presence_penalty: Subtracted once from the logit of each token of the output so far.
        frequency_penalty: Subtracted for each occurrence in the output so far.
        repetition_penalty: Divides (multiplies, when negative) logits of tokens of prompt and output; 1 is off.
        seed: Always set: token ``i`` of the output depends on (seed, i, distribution) only, so a request that is
            taken up again after a preemption or a crash goes on exactly as it would have.
        stop_token_ids: Output ends with any of these (end-of-sequence ids included, unless they are to be ignored).
        min_tokens: Stop tokens are not chosen before so many tokens.
        logprobs: Report the chosen token's log-probability and that many most likely ones; None is off.
        logit_bias: Added to the logits, by token id.
        grammar: What the output must match, in llguidance's form; it has the last word over everything above.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    grammar: str | None = None


@dataclass(slots=True)
class EngineRequest:
    """One sequence to generate.

    Attributes:
        request_id: Unique over the life of the server.
        prompt_ids: The prompt's tokens, at least one.
        sampling: See there.
        salt: Cache namespace of the tenant: pages are shared within one salt only.
        hints: What the scheduler knows of the application.
        output_ids: Tokens generated before (when an engine takes the request up again).
        prefill_only: Only fill the cache: ends with ``length`` and no token when the prompt is computed, as far as
            full pages go.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    salt: str = ""
    hints: CallHints = field(default_factory=CallHints)
    output_ids: list[int] = field(default_factory=list)
    prefill_only: bool = False


class TokenLogprobs(NamedTuple):
    """Log-probability of the chosen token and the most likely ones, by token id, best first."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class EngineOutput:
    """What a step did for one request.

    Attributes:
        request_id: Whose.
        token_ids: New output tokens, in order; a stop token is included. An output that completes its grammar may
            have none, and one of a request that is `prefill_only` never has any.
        logprobs: One entry for each of `token_ids`, where asked for.
        finish_reason: Set on the last output of a request.
        cached_tokens: Set on the first output after the request entered a batch: prompt tokens found in the cache.
        error: Set when the engine cannot go on with this request; a wire code and a message.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int | None = None
    error: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the server needs to know of a loaded engine.

    Attributes:
        vocab_size: Rows of the output projection.
        max_model_len: Prompt plus output, in tokens.
        page_size: Tokens a page holds.
        num_pages: Pages in the pool (the padding page not counted).
        page_bytes: Bytes of one page over all layers.
        weight_bytes: Bytes of the weights.
        device: Such as ``cpu`` or ``cuda:0``.
        dtype: Such as ``bfloat16``.
        backend: What runs the model: the ``native`` CPU decoder, or ``transformers``' modules.
        eos_token_ids: End-of-sequence ids from the model's generation config.
        ahead_rows: Tokens of a step up to which work ahead of time runs beside other work.
    """

    vocab_size: int
    max_model_len: int
    page_size: int
    num_pages: int
    page_bytes: int
    weight_bytes: int
    device: str
    dtype: str
    backend: str
    eos_token_ids: frozenset[int]
    ahead_rows: int


@dataclass(slots=True)
class EngineStats:
    """Counters and gauges of one engine since it started.

    `computed_tokens` are prompt tokens that went through the model, those of preempted requests each time, and
    `ahead_tokens` those of requests of class AHEAD, which count nowhere else; `draft_tokens` were guessed and verified,
    and `accepted_tokens` of them were right; `step_time_ms` are the coefficients of the step-time model
    (`scheduler.step_time`), by name; all other names say it.
    """

    steps: int = 0
    waiting: int = 0
    running: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    pages_total: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    ahead_tokens: int = 0
    output_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    evicted_pages: int = 0
    forward_s: float = 0.0
    overhead_s: float = 0.0
    restarts: int = 0
    step_time_ms: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """An engine as the server sees it: in a supervised process of its own, or in a thread of this one.

    All methods are called on the server's event loop, and `on_output` runs there too.
    """

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model; raises RuntimeError before `start` has returned."""
        ...

    @property
    def status(self) -> Literal["starting", "running", "restarting", "failed", "stopped"]:
        """Whether requests are being worked on."""
        ...

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        ...

    async def start(self) -> None:
        """Load the model; returns when requests are being worked on. Raises `ModelLoadError`."""
        ...

    def kill(self) -> None:
        """Stop for sure, without waiting for anything."""
        ...

    async def stop(self) -> None:
        """Stop for good; requests that are still there get no more output."""
        ...

    def submit(self, request: EngineRequest, on_output: Callable[[EngineOutput], None]) -> None:
        """Queue a request. Outputs come in order; the last has a `finish_reason` or an `error`."""
        ...

    def abort(self, request_ids: Iterable[str], *, keep_pages: bool = False) -> None:
        """Forget requests: no more output. Unknown and finished ids are nothing to do.

        Args:
            request_ids: Whose.
            keep_pages: They came to their end in another way than by their tokens (a stop string): what they have
                computed stays in the cache. Otherwise they are cancelled, and pages that only they use are free.
        """
        ...

    def let_go(self, holders: Iterable[str]) -> None:
        """Keep nothing for these any more: programs that have ended, and requests of class AHEAD (`CallHints.reuse`).

        Unknown ones are nothing to do.
        """
        ...

    async def stats(self) -> EngineStats:
        """The counters now."""
        ...
