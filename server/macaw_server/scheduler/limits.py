"""What no sequence gets past: contexts, pools, ends of outputs, deadlines. Pure."""

from __future__ import annotations

import math

from macaw_server.engine.types import CallClass, EngineRequest, FinishReason
from macaw_server.scheduler.step_time import StepFeatures, StepTimeModel
from macaw_server.scheduler.types import Sequence


def check_request(request: EngineRequest, *, max_model_len: int, pool_len: int) -> None:
    """Refuse what can never run.

    Args:
        request: As it came.
        max_model_len: Of the model, in tokens.
        pool_len: Tokens that the whole KV pool holds.

    Raises:
        ValueError: With the number seen, the one accepted, and what to do.
    """
    num_prompt = len(request.prompt_ids)
    if not num_prompt:
        raise ValueError(f"Request {request.request_id!r} has an empty prompt; it needs at least 1 token.")
    if request.hints.call_class is CallClass.AHEAD and not request.prefill_only:
        raise ValueError(f"Request {request.request_id!r} of class AHEAD samples; only prefills run ahead.")
    if num_prompt + 1 > max_model_len:
        raise ValueError(
            f"Prompt of {num_prompt:,} tokens and one of output are over the model's {max_model_len:,}. "
            "Shorten the prompt or serve with a larger --max-model-len."
        )
    if num_prompt + 1 > pool_len:
        raise ValueError(
            f"Prompt of {num_prompt:,} tokens and one of output are over the KV cache's {pool_len:,}. "
            "Shorten the prompt or serve with a larger --kv-memory."
        )


def finish_reason(sequence: Sequence, max_len: int) -> FinishReason | None:
    """Why a sequence ends with its last token, if it does; no sequence gets longer than `max_len`."""
    sampling, num_outputs = sequence.request.sampling, sequence.num_outputs
    if num_outputs > sampling.min_tokens and sequence.token_ids[-1] in sampling.stop_token_ids:
        return "stop"
    if num_outputs >= sampling.max_tokens or len(sequence.token_ids) >= max_len:
        return "length"
    return None


def latest_start_s(request: EngineRequest, step_time: StepTimeModel, slowdown: float) -> float:
    """When a request has to start: its deadline, less the time of the rest of its program in a batch that slows it."""
    hints, num_prompt = request.hints, len(request.prompt_ids)
    if hints.deadline_s == math.inf:
        return math.inf
    prefill_ms = step_time.predict(StepFeatures().plus(0, num_prompt, num_samples=1))
    decode_ms = step_time.predict(StepFeatures().plus(num_prompt, 1, num_samples=1))
    num_outputs = request.sampling.max_tokens if hints.path_tokens is None else hints.path_tokens
    return hints.deadline_s - (prefill_ms + num_outputs * decode_ms * slowdown) / 1000
