"""Choosing the next token, reproducibly: token ``i`` depends on (seed, i, distribution) only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from macaw_kernels import native_available
from macaw_kernels.cpu.sampling import Draw, choose_tokens
from macaw_server.engine.types import SamplingParams, TokenLogprobs

_MASK = (1 << 64) - 1
_LEAST_LOGPROB = -9999.0
"""What is reported for tokens that a model rules out: JSON has no infinity."""


class Row(NamedTuple):
    """What sampling needs to know of one sequence.

    Attributes:
        params: How to choose.
        token_ids: Prompt and output so far.
        num_prompt: How many of them are the prompt.
        drafts: Output that this row takes for granted, behind `token_ids`.
        mask: Tokens that the grammar allows, packed as in `engine.grammar`; None allows all.
    """

    params: SamplingParams
    token_ids: Seq[int]
    num_prompt: int
    drafts: tuple[int, ...] = ()
    mask: NDArray[np.int32] | None = None

    @property
    def num_output(self) -> int:
        """Tokens generated before this one."""
        return len(self.token_ids) + len(self.drafts) - self.num_prompt


class Sampled(NamedTuple):
    """The chosen token; `token` is None when the model's logits were not numbers, or no token is allowed."""

    token: int | None
    logprobs: TokenLogprobs | None


def uniform(seed: int, index: int) -> float:
    """A uniform number in [0, 1) for (seed, index), by SplitMix64 (Steele, Lea & Flood 2014)."""
    return (_mix(_mix(seed & _MASK) + index * 0x9E3779B97F4A7C15) >> 11) / (1 << 53)


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@torch.inference_mode()
def sample(logits: Tensor, rows: Seq[Row], *, native: bool = True) -> list[Sampled]:
    """Choose one token for each row.

    Args:
        logits: ``[num_rows, vocab_size]`` float32; changed in place.
        rows: One for each row of `logits`.
        native: Use the native kernels for logits on the CPU, where there are any.

    Returns:
        One choice for each row. Log-probabilities are those of the model, before temperature and penalties.
    """
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = dict(zip(wanted, torch.log_softmax(logits[wanted], dim=-1), strict=True)) if wanted else {}
    for i, row in enumerate(rows):
        _adjust(logits, i, row)
    if native and logits.device.type == "cpu" and native_available():
        tokens = choose_tokens(logits, [_draw(row) for row in rows])
    else:
        tokens = _choose_by_torch(logits, rows)
    return [
        Sampled(None, None)
        if token < 0
        else Sampled(token, _logprobs(raw[i], token, rows[i].params.logprobs or 0) if i in raw else None)
        for i, token in enumerate(tokens)
    ]


def _draw(row: Row) -> Draw:
    params = row.params
    u = uniform(params.seed, row.num_output) if params.temperature > 0 else 0.0
    return Draw(params.temperature, params.top_k, params.top_p, params.min_p, u, row.mask)


def _choose_by_torch(logits: Tensor, rows: Seq[Row]) -> list[int]:
    """As `choose_tokens`, on any device; by another sum of the same distribution, so rarely another token."""
    broken = torch.isnan(logits).any(dim=-1).tolist()
    masks = {i: row.mask for i, row in enumerate(rows) if row.mask is not None}
    if masks:
        constrained = list(masks)
        logits[constrained] = allowed = _masked(logits[constrained], list(masks.values()))
        for i, largest in zip(constrained, allowed.amax(dim=-1).tolist(), strict=True):
            broken[i] = broken[i] or largest == -math.inf
    tokens = torch.argmax(logits, dim=-1)
    for filtered in (False, True):  # apart, for filters sort the vocabulary: u must find a row's token in one order
        drawn = [
            i
            for i, row in enumerate(rows)
            if row.params.temperature > 0 and _filters(row.params) is filtered and not broken[i]
        ]
        if drawn:
            tokens[drawn] = _inverse_cdf(logits[drawn], [rows[i] for i in drawn], filtered=filtered)
    return [-1 if bad else token for bad, token in zip(broken, tokens.tolist(), strict=True)]


def _adjust(all_logits: Tensor, index: int, row: Row) -> None:
    """Apply bias, penalties and the minimum length to one row, in place."""
    params = row.params
    if (
        not params.logit_bias
        and params.repetition_penalty == 1.0
        and not params.presence_penalty
        and not params.frequency_penalty
        and row.num_output >= params.min_tokens
    ):
        return
    logits = all_logits[index]
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if params.repetition_penalty != 1.0:
        ids = torch.tensor(sorted({*row.token_ids, *row.drafts}), device=logits.device)
        values = logits[ids]
        penalty = params.repetition_penalty
        logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and row.num_output:
        counts = Counter(row.token_ids[row.num_prompt :])
        counts.update(row.drafts)
        penalties = [params.presence_penalty + params.frequency_penalty * n for n in counts.values()]
        logits[torch.tensor(list(counts), device=logits.device)] -= torch.tensor(penalties, device=logits.device)
    if row.num_output < params.min_tokens and params.stop_token_ids and row.mask is None:  # else the mask knows
        logits[torch.tensor(sorted(params.stop_token_ids), device=logits.device)] = -torch.inf


def _masked(logits: Tensor, masks: Seq[NDArray[np.int32]]) -> Tensor:
    """The logits with those of forbidden tokens at minus infinity."""
    bits = np.unpackbits(np.stack(masks).view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    return torch.where(torch.from_numpy(bits).view(torch.bool).to(logits.device), logits, -torch.inf)


def _filters(params: SamplingParams) -> bool:
    return bool(params.top_k or params.top_p < 1 or params.min_p)


def _inverse_cdf(logits: Tensor, rows: Seq[Row], *, filtered: bool) -> Tensor:
    """Inverse-CDF sampling: temperature, then top-k, then top-p, then min-p, as transformers orders them."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device, dtype=torch.float64).unsqueeze(1)

    params = [row.params for row in rows]
    # The maximum is 0, so that what a tiny temperature makes overflow has probability 0 and is never NaN.
    logits = logits.double()
    logits -= logits.amax(dim=-1, keepdim=True)
    probs = torch.softmax(logits / column([p.temperature for p in params]), dim=-1)
    order = None
    if filtered:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(probs.shape[1], device=probs.device)
        probs[rank >= column([p.top_k or probs.shape[1] for p in params])] = 0
        probs /= probs.sum(dim=-1, keepdim=True)
        before = probs.cumsum(dim=-1) - probs
        top_p = column([p.top_p for p in params])
        probs[(before >= top_p) & (top_p < 1)] = 0
        probs[probs < column([p.min_p for p in params]) * probs[:, :1]] = 0
    cdf = probs.cumsum(dim=-1)
    u = column([uniform(row.params.seed, row.num_output) for row in rows]) * cdf[:, -1:]
    # The first index whose cumulative mass exceeds u: always one with a probability above 0.
    chosen = torch.searchsorted(cdf, u, right=True).clamp_(max=probs.shape[1] - 1)
    return (chosen if order is None else order.gather(1, chosen)).squeeze(1)


def _logprobs(raw: Tensor, token: int, num_top: int) -> TokenLogprobs:
    raw = raw.clamp(min=_LEAST_LOGPROB)
    top = raw.topk(num_top)
    return TokenLogprobs(raw[token].item(), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
