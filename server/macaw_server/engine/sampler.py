"""Choosing the next token, reproducibly: token ``i`` depends on (seed, i, distribution) only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from macaw_kernels import native_available
from macaw_kernels.cpu.sampling import Draw, choose_tokens
from macaw_kernels.transfers import Download, upload
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
        num_ahead: Output behind all that which is not known yet.
    """

    params: SamplingParams
    token_ids: Seq[int]
    num_prompt: int
    drafts: tuple[int, ...] = ()
    mask: NDArray[np.int32] | None = None
    num_ahead: int = 0

    @property
    def num_output(self) -> int:
        """Tokens generated before this one."""
        return len(self.token_ids) + len(self.drafts) + self.num_ahead - self.num_prompt


class Sampled(NamedTuple):
    """The chosen token; `token` is None when the model's logits were not numbers, or no token is allowed."""

    token: int | None
    logprobs: TokenLogprobs | None


class Choices:
    """The tokens of a step; on a GPU they may still be being chosen.

    Args:
        tokens: See below.
        rows: What they were chosen for.
        raw: ``[n, vocab_size]`` log-probabilities of the `n` rows that report them.

    Attributes:
        tokens: ``[num_rows]`` int64 on the device of the logits; -1 where nothing could be chosen.
    """

    def __init__(self, tokens: Tensor, rows: Seq[Row], raw: Tensor | None) -> None:
        self.tokens = tokens
        self._num_top = [row.params.logprobs for row in rows]
        if raw is None:
            self._download = Download(tokens)
            return
        chosen = _take(tokens, _wanted(rows)).clamp(min=0).unsqueeze(1)
        top = raw.topk(max(n or 0 for n in self._num_top))
        logprobs = (x.clamp(min=_LEAST_LOGPROB) for x in (raw.gather(1, chosen).squeeze(1), top.values))
        self._download = Download(tokens, *logprobs, top.indices)

    def result(self) -> list[Sampled]:
        """One choice for each row; waits for the device."""
        tokens, *report = (x.tolist() for x in self._download.wait())
        entries = zip(*report, strict=True)
        choices = []
        for token, num_top in zip(tokens, self._num_top, strict=True):
            logprobs = None
            if num_top is not None:
                logprob, values, ids = next(entries)
                logprobs = TokenLogprobs(logprob, list(zip(ids[:num_top], values[:num_top], strict=True)))
            choices.append(Sampled(None, None) if token < 0 else Sampled(token, logprobs))
        return choices


def uniform(seed: int, index: int) -> float:
    """A uniform number in [0, 1) for (seed, index), by SplitMix64 (Steele, Lea & Flood 2014)."""
    return (_mix(_mix(seed & _MASK) + index * 0x9E3779B97F4A7C15) >> 11) / (1 << 53)


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@torch.inference_mode()
def sample(logits: Tensor, rows: Seq[Row], *, native: bool = True) -> Choices:
    """Choose one token for each row. On a GPU this only issues the work: nothing waits for the device.

    Args:
        logits: ``[num_rows, vocab_size]`` float32; changed in place.
        rows: One for each row of `logits`.
        native: Use the native kernels for logits on the CPU, where there are any.

    Returns:
        One choice for each row. Log-probabilities are those of the model, before temperature and penalties.
    """
    wanted = _wanted(rows)
    raw = torch.log_softmax(_take(logits, wanted), dim=-1) if wanted else None
    for i, row in enumerate(rows):
        _adjust(logits, i, row)
    if native and logits.device.type == "cpu" and native_available():
        tokens = torch.tensor(choose_tokens(logits, [_draw(row) for row in rows]), dtype=torch.int64)
    else:
        tokens = _choose_by_torch(logits, rows)
    return Choices(tokens, rows, raw)


def _wanted(rows: Seq[Row]) -> list[int]:
    """The rows that report log-probabilities."""
    return [i for i, row in enumerate(rows) if row.params.logprobs is not None]


def _draw(row: Row) -> Draw:
    params = row.params
    return Draw(params.temperature, params.top_k, params.top_p, params.min_p, _u(row), row.mask)


def _u(row: Row) -> float:
    return uniform(row.params.seed, row.num_output) if row.params.temperature > 0 else 0.0


def _choose_by_torch(logits: Tensor, rows: Seq[Row]) -> Tensor:
    """As `choose_tokens`, on any device; by another sum of the same distribution, so rarely another token."""
    broken = torch.isnan(logits).any(dim=-1)
    constrained = [i for i, row in enumerate(rows) if row.mask is not None]
    if constrained:
        allowed = _masked(_take(logits, constrained), [rows[i].mask for i in constrained])
        _put(logits, constrained, allowed)
        _put(broken, constrained, _take(broken, constrained) | (allowed.amax(dim=-1) == -torch.inf))
    tokens = torch.argmax(logits, dim=-1)
    for filtered in (False, True):  # apart, for filters sort the vocabulary: u must find a row's token in one order
        drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0 and _filters(row.params) is filtered]
        if drawn:
            _put(tokens, drawn, _inverse_cdf(_take(logits, drawn), [rows[i] for i in drawn], filtered=filtered))
    return torch.where(broken, -1, tokens)  # what was drawn from no numbers is any token


def _take(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor, in ascending order; the tensor itself when that is all."""
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, upload(np.array(rows), tensor.device))


def _put(tensor: Tensor, rows: list[int], values: Tensor) -> None:
    """Replace some rows of a tensor, in place."""
    tensor.index_copy_(0, upload(np.array(rows), tensor.device), values)


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

    def there(values: Iterable[float], dtype: type = np.int64) -> Tensor:
        return upload(np.fromiter(values, dtype), logits.device)

    if params.logit_bias:
        logits[there(params.logit_bias)] += there(params.logit_bias.values(), np.float32)
    if params.repetition_penalty != 1.0:
        ids = there({*row.token_ids, *row.drafts})
        values = logits[ids]
        penalty = params.repetition_penalty
        logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and row.num_output:
        counts = Counter(row.token_ids[row.num_prompt :])
        counts.update(row.drafts)
        penalties = (params.presence_penalty + params.frequency_penalty * n for n in counts.values())
        logits[there(counts)] -= there(penalties, np.float32)
    if row.num_output < params.min_tokens and params.stop_token_ids and row.mask is None:  # else the mask knows
        logits.index_fill_(0, there(params.stop_token_ids), -torch.inf)


def _masked(logits: Tensor, masks: Seq[NDArray[np.int32] | None]) -> Tensor:
    """The logits with those of forbidden tokens at minus infinity."""
    words = upload(np.stack([mask for mask in masks if mask is not None]), logits.device)
    bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def _filters(params: SamplingParams) -> bool:
    return bool(params.top_k or params.top_p < 1 or params.min_p)


def _inverse_cdf(logits: Tensor, rows: Seq[Row], *, filtered: bool) -> Tensor:
    """Inverse-CDF sampling: temperature, then top-k, then top-p, then min-p, as transformers orders them."""
    columns = [(r.params.temperature, r.params.top_k, r.params.top_p, r.params.min_p, _u(r)) for r in rows]
    packed = upload(np.array(columns, dtype=np.float64), logits.device)
    temperature, top_k, top_p, min_p, u = packed.unsqueeze(-1).unbind(1)  # each [num_rows, 1]
    # The maximum is 0, so that what a tiny temperature makes overflow has probability 0 and is never NaN.
    logits = logits.double()
    logits -= logits.amax(dim=-1, keepdim=True)
    probs = torch.softmax(logits / temperature, dim=-1)
    order = None
    if filtered:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(probs.shape[1], device=probs.device)
        probs.masked_fill_((rank >= top_k) & (top_k > 0), 0)
        probs /= probs.sum(dim=-1, keepdim=True)
        before = probs.cumsum(dim=-1) - probs
        probs.masked_fill_((before >= top_p) & (top_p < 1), 0)
        probs.masked_fill_(probs < min_p * probs[:, :1], 0)
    cdf = probs.cumsum(dim=-1)
    # The first index whose cumulative mass exceeds u: always one with a probability above 0.
    chosen = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_(max=probs.shape[1] - 1)
    return (chosen if order is None else order.gather(1, chosen)).squeeze(1)
