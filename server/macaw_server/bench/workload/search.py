"""Which rate to try next: a ladder until one rate is sustained and one is not, then bisection. No I/O, no clock."""

from __future__ import annotations

import math

TOLERANCE = 1.1
"""The rate that is found and the lowest one that failed differ by this factor at most."""
LADDER = 2.0
"""Between one rung and the next, while nothing is known."""
NEAR = TOLERANCE**2
"""The same, where an earlier round says about where to look: one bisection is enough then."""


class RateSearch:
    """The highest rate that a side sustains, to within `TOLERANCE`.

    A rate that was missed is tried once more before that counts: what else the machine does can only make it look
    worse.

    Args:
        start: The first rate, per second.
        floor: None below it is tried.
        step: Factor from rung to rung.

    Attributes:
        low: The highest rate that was sustained; 0: none yet.
        high: The lowest that was not; infinite: none yet.
    """

    def __init__(self, start: float, floor: float, step: float = LADDER) -> None:
        self._start, self._floor, self._step = max(start, floor), floor, step
        self.low, self.high = 0.0, math.inf
        self._doubted: float | None = None

    @property
    def next_rate(self) -> float | None:
        """To try now; None when the answer is known, or no rate from the floor on is sustained."""
        if self._doubted is not None:
            return self._doubted
        if not self.low and self.high == math.inf:
            return self._start
        if self.high == math.inf:
            return self.low * self._step
        if not self.low:
            return max(self.high / self._step, self._floor) if self.high > self._floor else None
        return math.sqrt(self.low * self.high) if self.high / self.low > TOLERANCE + 1e-9 else None

    def tell(self, rate: float, sustained: bool) -> None:
        """What came of `rate`."""
        if sustained:
            self.low = max(self.low, rate)
        elif self._doubted is None:
            self._doubted = rate
            return
        else:
            self.high = min(self.high, rate)
        self._doubted = None
