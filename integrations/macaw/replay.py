"""The answer of one planned call, as it comes in; for adapters, which replay it to a framework."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

from macaw.errors import CancelledError
from macaw.protocol import CallCompleted, CallDelta, CallFailed, CallTimings, ErrorBody

CallEvent = CallDelta | CallCompleted | CallFailed

ABANDONED = CallFailed(
    call_id="abandoned",
    error=ErrorBody(**CancelledError("The run was abandoned before this answer was there.").to_wire()),
    timings=CallTimings(),
)
"""What is put in the place of answers that an abandoned run does not get."""


class Replay:
    """The events of one planned call, for one reader in any thread or event loop."""

    def __init__(self) -> None:
        self.ended = False
        # Reentrant: a garbage collection under it may close the stream that reads from here.
        self._lock = threading.RLock()
        self._arrived: deque[CallEvent | None] = deque()
        self._waiter: Future[CallEvent | None] | None = None
        self._wants_deltas = True

    def skip_deltas(self) -> None:
        """Keep only the end: the reader wants the whole answer at once."""
        with self._lock:
            self._wants_deltas = False
            self._arrived = deque(event for event in self._arrived if not isinstance(event, CallDelta))

    def next(self) -> Future[CallEvent | None]:
        """The next event, as soon as it is there; None if the stream broke before this call's end."""
        future: Future[CallEvent | None] = Future()
        with self._lock:
            if self._arrived:
                future.set_result(self._arrived.popleft())
            else:
                self._waiter = future
        return future

    def put(self, event: CallEvent | None) -> None:
        """Hand an event to the reader, or keep it; nothing comes after the end."""
        with self._lock:
            if self.ended or (isinstance(event, CallDelta) and not self._wants_deltas):
                return
            self.ended = not isinstance(event, CallDelta)
            waiter, self._waiter = self._waiter, None
            if waiter is None or not waiter.set_running_or_notify_cancel():
                self._arrived.append(event)
                return
        waiter.set_result(event)


def abandoned() -> Replay:
    """One that has ended so."""
    replay = Replay()
    replay.put(ABANDONED)
    return replay
