"""The bound on live calls: how many there may be, whose, and when to come back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from macaw.errors import InvalidProgramError, OverloadedError
from macaw_server.service.types import Tenant

SHARE = 4.0
"""A tenant of weight 1 may have so many times the room that is left. Alone it gets 4/5 of the bound, two get 4/9 each;
there is always room for one more tenant, with no share set aside for those that are not there (dynamic thresholds:
Choudhury & Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998)."""
_RATE_WINDOW_S = 60.0
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 600.0


class Admission:
    """Counts the calls that wait or run, from before their prompts are rendered to their end.

    Args:
        limit: Of all tenants together.
        shared: Whether there are several tenants, so that none may fill it.
        clock: Seconds.
    """

    def __init__(self, limit: int, *, shared: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._shared = shared
        self._clock = clock
        self._live: dict[Tenant, int] = {}
        self._num_live = 0
        self._all = _Flow()
        self._flows: dict[Tenant, _Flow] = {}

    @property
    def num_live(self) -> int:
        """Live calls of all tenants."""
        return self._num_live

    def num_live_of(self, tenant: Tenant) -> int:
        """Live calls of one tenant."""
        return self._live.get(tenant, 0)

    def check(self, tenant: Tenant, num_new: int) -> None:
        """Whether there is room for so many more calls.

        Raises:
            InvalidProgramError: There never will be.
            OverloadedError: Not now; `retry_after_s` says when, by how long calls took lately, and how many ended.
        """
        if num_new > self._limit:
            raise InvalidProgramError(
                f"{num_new:,} calls at once are over this server's limit of {self._limit:,}. Send fewer, and grow "
                "an open program as they complete.",
                param="calls",
            )
        over = self._num_live + num_new - self._limit
        if over > 0:
            raise OverloadedError(
                f"{self._num_live:,} calls are waiting or running; with {num_new:,} more they would be over the limit "
                f"of {self._limit:,}. Try again after the time in Retry-After.",
                retry_after_s=_limited(self._all.until_ended(over, self._clock())),
            )
        share, mine = SHARE * tenant.weight, self.num_live_of(tenant)
        allowed = math.floor(share * (self._limit - self._num_live))
        if self._shared and mine and mine + num_new > allowed:
            over = math.ceil((mine + num_new - allowed) / (1 + share))  # each that ends is one less, and leaves room
            raise OverloadedError(
                f"{mine:,} calls of this API key are waiting or running; with {num_new:,} more they would be over its "
                f"share of {allowed:,} while other keys have {self._num_live - mine:,}, of {self._limit:,} in all. Try "
                "again after the time in Retry-After.",
                retry_after_s=_limited(self._until_ended(tenant, over)),
            )

    def begin(self, tenant: Tenant, num_new: int) -> None:
        """Count calls as live; raises as `check` does, and then nothing has changed."""
        self.check(tenant, num_new)
        self._live[tenant] = self.num_live_of(tenant) + num_new
        self._num_live += num_new
        now_s = self._clock()
        for flow in (self._all, self._flows.setdefault(tenant, _Flow())):
            flow.begin(now_s, num_new)

    def end(self, tenant: Tenant, num_calls: int, *, served: bool = True) -> None:
        """Count calls no more.

        Args:
            tenant: Whose.
            num_calls: How many.
            served: They took their time; False when they were refused after all.
        """
        self._num_live -= num_calls
        self._live[tenant] -= num_calls
        assert self._live[tenant] >= 0, f"{self._live[tenant]} live calls of tenant {tenant.id}"
        if not self._live[tenant]:
            del self._live[tenant]
        now_s = self._clock()
        for flow in (self._all, self._flows[tenant]):
            flow.end(now_s, num_calls, served=served)

    def _until_ended(self, tenant: Tenant, num_calls: int) -> float | None:
        """How long until so many calls of a tenant have ended; where none has lately, by its share of all that have."""
        now_s = self._clock()
        own = self._flows[tenant].until_ended(num_calls, now_s)
        if own is None and (per_second := self._all.per_second(now_s)):
            weights = sum(other.weight for other in self._live) or tenant.weight
            own = num_calls / (per_second * tenant.weight / weights)
        return own


def _limited(seconds: float | None) -> float:
    """What a client is told; a minute where nothing is known."""
    return _RATE_WINDOW_S if seconds is None else min(_MAX_RETRY_S, max(_MIN_RETRY_S, math.ceil(seconds)))


class _Flow:
    """Calls of a tenant, or of all: when those that live began, and the last minute's ends, of 1,024 at most.

    Which of the calls ends is not told apart: the one that began first is taken for it, and the mean time is right.
    """

    def __init__(self) -> None:
        self._begins: deque[float] = deque()
        self._ends: deque[tuple[float, int, float]] = deque(maxlen=1024)  # when, how many, seconds that they took

    def begin(self, now_s: float, num_calls: int) -> None:
        self._begins.extend([now_s] * num_calls)

    def end(self, now_s: float, num_calls: int, *, served: bool) -> None:
        if served:
            took_s = sum(now_s - self._begins.popleft() for _ in range(num_calls))
            self._ends.append((now_s, num_calls, took_s))
        else:
            for _ in range(num_calls):
                self._begins.pop()

    def per_second(self, now_s: float) -> float:
        """Ends."""
        while self._ends and self._ends[0][0] < now_s - _RATE_WINDOW_S:
            self._ends.popleft()
        if not self._ends:
            return 0.0
        return sum(num_calls for _, num_calls, _ in self._ends) / (now_s - self._ends[0][0] + 1.0)

    def until_ended(self, num_calls: int, now_s: float) -> float | None:
        """How long until so many have ended; None where none has lately.

        That is at their rate, and not before the oldest have had the mean time: calls that began together end together.
        Where these are late and nothing ends, they may be as late again.
        """
        per_second = self.per_second(now_s)
        if not per_second:
            return None
        total = sum(num for _, num, _ in self._ends)
        mean_s = sum(took_s for _, _, took_s in self._ends) / total
        oldest_s = self._begins[min(num_calls, len(self._begins)) - 1] if self._begins else now_s
        missing_s = oldest_s + mean_s - now_s
        return max(num_calls / per_second, missing_s, min(-missing_s, now_s - self._ends[-1][0]))
