"""The requests that an engine is working on, as the server's side remembers them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from macaw_server.engine.types import EngineOutput, EngineRequest

log = logging.getLogger(__name__)

OnOutput = Callable[[EngineOutput], None]


@dataclass(slots=True)
class Entry:
    """A request, who hears of its outputs, and how often an engine died with it.

    Attributes:
        request: With the outputs so far.
        on_output: Called with each output.
        started: Its client knows that it has entered a batch.
        crashes: Deaths of engines that had it.
    """

    request: EngineRequest
    on_output: OnOutput
    started: bool = False
    crashes: int = 0


class InflightTable:
    """Delivers outputs to their callbacks and keeps what is needed to take a request up again on a new engine."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def put(self, entry: Entry) -> None:
        """Remember a request."""
        assert entry.request.request_id not in self._entries, f"request id {entry.request.request_id} is in use"
        self._entries[entry.request.request_id] = entry

    def take_all(self) -> list[Entry]:
        """Hand over all requests, in order of arrival."""
        entries, self._entries = list(self._entries.values()), {}
        return entries

    def take_waiting(self, request_id: str) -> Entry | None:
        """Hand over a request of which nobody has heard that it entered a batch; None if somebody has."""
        entry = self._entries.get(request_id)
        if entry is None or entry.started:
            return None
        return self._entries.pop(request_id)

    def remove(self, request_id: str) -> bool:
        """Forget a request; whether it was there."""
        return self._entries.pop(request_id, None) is not None

    def deliver(self, outputs: list[EngineOutput]) -> None:
        """Hand each output to its request's callback; outputs of forgotten requests are dropped."""
        for output in outputs:
            entry = self._entries.get(output.request_id)
            if entry is None:
                continue
            if entry.started:  # a request that was taken up again starts only once for its client
                output.cached_tokens = None
            entry.started = entry.started or output.cached_tokens is not None
            entry.request.output_ids.extend(output.token_ids)
            if output.finish_reason is not None or output.error is not None:
                del self._entries[output.request_id]
            try:
                entry.on_output(output)
            except Exception:
                log.exception("delivering output of request %s", output.request_id)

    def crashed(self, max_crashes: int) -> None:
        """The engine died: a request that was there `max_crashes` times is likely the cause, and fails."""
        for entry in self._entries.values():
            entry.crashes += 1
        for request_id in [id_ for id_, entry in self._entries.items() if entry.crashes >= max_crashes]:
            self.fail(request_id, f"the engine died {max_crashes} times while it worked on this call")

    def requests(self) -> list[EngineRequest]:
        """All requests with their outputs so far, in order of arrival."""
        return [entry.request for entry in self._entries.values()]

    def fail(self, request_id: str, message: str) -> None:
        """End a request with the error `engine_failed`."""
        self.deliver([EngineOutput(request_id, error=("engine_failed", message))])

    def fail_all(self, message: str) -> None:
        """End every request with the error `engine_failed`."""
        for request_id in list(self._entries):
            self.fail(request_id, message)

    def __len__(self) -> int:
        return len(self._entries)
