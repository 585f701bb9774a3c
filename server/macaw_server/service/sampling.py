"""From OpenAI's request fields to the engine's sampling parameters."""

from __future__ import annotations

import random

from macaw.errors import InvalidRequestError
from macaw.protocol import ChatCompletionRequest, CompletionRequest
from macaw_server.engine.types import EngineInfo, SamplingParams

_SEEDS = 2**64
_random = random.Random()
"""Asks the system for entropy once: on a virtual machine that can take 0.1 ms each time."""


def requested_max_tokens(request: ChatCompletionRequest | CompletionRequest) -> int | None:
    """The output limit that the request names, under either of the names that it has in a chat."""
    newer = request.max_completion_tokens if isinstance(request, ChatCompletionRequest) else None
    return request.max_tokens if newer is None else newer


def check_request(request: ChatCompletionRequest | CompletionRequest, info: EngineInfo) -> None:
    """Refuse what can be told to be wrong without the prompt.

    Raises:
        InvalidRequestError: Token ids that the model does not have, or fields that contradict each other.
    """
    for field, ids in (
        ("logit_bias", map(int, request.logit_bias or ())),
        ("stop_token_ids", request.stop_token_ids),
    ):
        _check_token_ids(list(ids or ()), field, info.vocab_size)
    if isinstance(request, ChatCompletionRequest) and None not in (
        request.max_tokens,
        request.max_completion_tokens,
    ):
        raise InvalidRequestError(
            f"Both max_tokens ({request.max_tokens}) and max_completion_tokens "
            f"({request.max_completion_tokens}) are given, which mean the same. Send one of them.",
            param="max_tokens",
        )
    limit = requested_max_tokens(request)
    if limit is not None and request.min_tokens > limit:
        raise InvalidRequestError(
            f"min_tokens {request.min_tokens:,} is over max_tokens {limit:,}. Lower one or raise the other.",
            param="min_tokens",
        )
    if isinstance(request, CompletionRequest) and isinstance(request.prompt, list):
        _check_token_ids([item for item in request.prompt if isinstance(item, int)], "prompt", info.vocab_size)


def base_seed(request: ChatCompletionRequest | CompletionRequest) -> int:
    """The first choice's seed: the request's, or a random one. Choice ``i`` uses the ``i``-th after it."""
    return _random.getrandbits(63) if request.seed is None else request.seed


def sampling_params(
    request: ChatCompletionRequest | CompletionRequest,
    info: EngineInfo,
    *,
    max_tokens: int,
    seed: int,
    grammar: str | None = None,
) -> SamplingParams:
    """OpenAI's defaults filled in; end-of-sequence ids stop unless the request ignores them."""
    if isinstance(request, ChatCompletionRequest):
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    else:
        logprobs = request.logprobs
    eos = frozenset() if request.ignore_eos else info.eos_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=request.top_k or 0,
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        seed=seed % _SEEDS,
        stop_token_ids=eos | frozenset(request.stop_token_ids or ()),
        min_tokens=request.min_tokens,
        logprobs=logprobs,
        logit_bias={int(token_id): bias for token_id, bias in (request.logit_bias or {}).items()},
        grammar=grammar,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_token_ids(token_ids: list[int], field: str, vocab_size: int) -> None:
    wrong = next((id_ for id_ in token_ids if not 0 <= id_ < vocab_size), None)
    if wrong is not None:
        raise InvalidRequestError(
            f"{field} has token id {wrong}; the model's ids are 0 to {vocab_size - 1}.", param=field
        )
