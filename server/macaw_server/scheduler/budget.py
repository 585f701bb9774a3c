"""What may still go into a step: tokens, and the time that those who go first leave to everybody else. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from macaw_server.scheduler.step_time import StepFeatures, StepTimeModel
from macaw_server.scheduler.types import Sequence

MIN_CHUNK = 16
"""Tokens that the first of those who give way gets in every step, whatever that costs the protected ones."""
LEADER_SLOWDOWN = 10.0
"""How far others may slow the program that is first in order where nothing is latency-critical: a batch so large runs
at nearly full throughput, and the first program still ends long before the last."""


class StepBudget:
    """The budget of one step.

    As long as protected sequences decode, others add to the step what keeps it within `slowdown` times what it takes
    with the protected ones alone, as the step-time model predicts it. That replaces caps on the batch: how many
    prefills or decodes that is depends on the machine, the model and the contexts.

    Args:
        num_tokens: Of the step at most.
        model: Predicts.
        protected: Sequences that decode, and whose time per token counts; none: tokens are the only limit.
        slowdown: At least 1.
    """

    def __init__(self, num_tokens: int, model: StepTimeModel, protected: Iterable[Sequence], slowdown: float) -> None:
        self.num_tokens = num_tokens
        self._model = model
        self._num_given = 0  # tokens to those who give way
        self._left_ms = math.inf
        num_decodes, num_kv_tokens = 0, 0
        for sequence in protected:
            num_decodes += 1
            num_kv_tokens += sequence.num_computed + 1
        self._features = StepFeatures(num_decodes, num_decodes, num_kv_tokens, num_kv_tokens)
        if num_decodes:
            self._left_ms = (slowdown - 1) * model.predict(self._features)

    @property
    def limited(self) -> bool:
        """Whether anybody has to give way."""
        return self._left_ms < math.inf

    @property
    def exhausted(self) -> bool:
        """Whether who gives way gets nothing any more."""
        return self.num_tokens == 0 or (self.limited and self._num_given >= MIN_CHUNK and self._fits(0, 1) == 0)

    def room(self, start: int, wanted: int, *, gives_way: bool) -> int:
        """How many of `wanted` tokens from position `start` on may be run; `take` takes them.

        Args:
            start: Position of the first.
            wanted: At least 1.
            gives_way: To the protected ones.
        """
        wanted = min(wanted, self.num_tokens)
        if not gives_way or not self.limited:
            return wanted
        return max(self._fits(start, wanted), min(wanted, MIN_CHUNK - self._num_given))

    def take(self, start: int, length: int, *, gives_way: bool) -> None:
        """Note what goes into the step."""
        self.num_tokens -= length
        if gives_way and self.limited:
            self._num_given += length
            self._left_ms -= self._cost_ms(start, length)
            self._features = self._features.plus(start, length, num_samples=1)  # along the model's knee

    def _fits(self, start: int, wanted: int) -> int:
        """The most tokens, up to `wanted`, whose cost is within what is left."""
        if self._cost_ms(start, wanted) <= self._left_ms:
            return wanted
        low, high = 0, wanted
        while low < high:
            middle = (low + high + 1) // 2
            if self._cost_ms(start, middle) <= self._left_ms:
                low = middle
            else:
                high = middle - 1
        return low

    def _cost_ms(self, start: int, length: int) -> float:
        more = self._features.plus(start, length, num_samples=1)
        return self._model.predict(more) - self._model.predict(self._features)
