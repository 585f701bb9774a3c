"""The ridge of speculation (`scheduler/speculation.py`), measured: what a further row costs in a step of this model.

A step of ``n`` rows takes ``a + b n`` seconds, and the ridge is ``a / b``. Two steps at load give a first line; every
decode step moves it, for rows cost more where each is sampled with penalties, or reads a long context.
"""

from __future__ import annotations

import time

from macaw_server.engine.runner import Chunk, ModelRunner
from macaw_server.engine.types import EngineInfo

_ROWS = (1, 9)
_ROUNDS = 4
_LIMITS = (0.5, 512.0)


class RidgeEstimate:
    """A line through the times of steps by their rows: least squares, of the first two and of the last ones.

    Args:
        first: (rows, seconds) of steps whose word never fades, so that there is a line where all steps are alike.

    Attributes:
        ridge: Rows that cost as much as a step does without any; within sane limits.
    """

    KEPT = 0.98
    """Of the weight of what was seen, after each step: the last fifty count."""
    FIRST_WEIGHT = 1.0
    MOST = 4.0
    """A step that took longer than the line says by this factor was disturbed, and counts as that much."""

    EVERY = 8
    """Steps between two fits: what it takes must not show in a tiny model's step."""

    def __init__(self, *first: tuple[int, float]) -> None:
        self._first = first
        self._sums = (0.0,) * 5  # of weights, n, n^2, t, n t
        self._num_seen = 0
        self._fit()

    def observe(self, rows: int, seconds: float) -> None:
        """Take a step into account."""
        seconds = min(seconds, self.MOST * (self._fixed + self._row * rows))
        weight, n, nn, t, nt = self._sums
        kept = self.KEPT
        self._sums = (
            kept * weight + 1.0,
            kept * n + rows,
            kept * nn + rows * rows,
            kept * t + seconds,
            kept * nt + rows * seconds,
        )
        self._num_seen += 1
        if self._num_seen % self.EVERY == 0:
            self._fit()

    def _fit(self) -> None:
        weight, n, nn, t, nt = self._sums
        for rows, seconds in self._first:
            weight += self.FIRST_WEIGHT
            n += self.FIRST_WEIGHT * rows
            nn += self.FIRST_WEIGHT * rows * rows
            t += self.FIRST_WEIGHT * seconds
            nt += self.FIRST_WEIGHT * rows * seconds
        self._row = max(0.0, (weight * nt - n * t) / (weight * nn - n * n))
        self._fixed = max(0.0, (t - self._row * n) / weight)
        self.ridge = limited(self._fixed, self._row)


def limited(fixed: float, row: float) -> float:
    """The ridge of a step that costs `fixed`, and `row` for each row, within sane limits."""
    least, most = _LIMITS
    return most if row * most <= fixed else max(least, fixed / row)


def measured(runner: ModelRunner, info: EngineInfo) -> RidgeEstimate:
    """A first estimate, from one sequence without and with drafts.

    Takes ten steps, which write to the first pages of the pool: call it before anything is cached.
    """
    page_size = info.page_size
    alone, drafted = _ROWS
    drafted = max(2, min(drafted, info.num_pages * page_size))
    pages = list(range(-(-drafted // page_size)))

    def seconds(rows: int) -> float:
        begin = time.perf_counter()
        runner.run([Chunk([0] * rows, 0, pages, rows)]).max().item()  # waits for the device
        return time.perf_counter() - begin

    # The least of some, for what else the machine does only adds; the first pair compiles and lays out.
    pairs = [(seconds(alone), seconds(drafted)) for _ in range(1 + _ROUNDS)][1:]
    least = [min(times) for times in zip(*pairs, strict=True)]
    return RidgeEstimate((alone, least[0]), (drafted, least[1]))
