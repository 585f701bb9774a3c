"""Sequences of class AHEAD: those that wait, those that hold pages, and what a step may give them."""

from __future__ import annotations

from macaw_server.scheduler.types import SchedulerConfig, Sequence

LONE_STEP = 4
"""Ridges that a step runs of nothing but work ahead: long enough to be efficient, and short for whoever comes
meanwhile."""


class AheadSequences:
    """First in, first out: the next call of a program asks first.

    Attributes:
        running: By request id, in order of admission.
    """

    def __init__(self) -> None:
        self.running: dict[str, Sequence] = {}
        self._waiting: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence to those that wait."""
        self._waiting[sequence.request_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Take one out of those that wait."""
        del self._waiting[sequence.request_id]

    def first(self) -> Sequence | None:
        """The one that is next; it stays."""
        return next(iter(self._waiting.values()), None)

    def to_yield(self, request_id: str | None) -> Sequence | None:
        """Who gives up its pages: the one named, or the last one admitted."""
        if request_id is not None:
            return self.running.get(request_id)
        return next(reversed(self.running.values()), None)


def ahead_budget(num_tokens: int, config: SchedulerConfig) -> int:
    """Tokens of work ahead in a step that runs `num_tokens` of others.

    Where a step that decodes waits for its weights, some rows more cost it next to nothing. Beyond, or where there is
    no such room, work ahead takes from those who wait for the step what it saves later.
    """
    room = config.ahead_rows - num_tokens if num_tokens else max(1, int(LONE_STEP * config.ridge))
    return max(0, min(room, config.max_num_batched_tokens - num_tokens))
