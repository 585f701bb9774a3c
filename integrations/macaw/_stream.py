"""The state of a program's event stream, without I/O: bytes in, events out, how to go on after a break."""

from __future__ import annotations

from collections import deque
from typing import Any

from pydantic import TypeAdapter, ValidationError

from macaw._sse import SSEDecoder
from macaw._transport import Endpoint, Operation, get_events
from macaw.errors import ConnectionFailedError, MacawError, ServerError
from macaw.protocol import AnyEvent, ProgramCompleted, ProgramCreated, ProgramFailed

_EVENT: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)


class StreamState:
    """What a stream has received.

    Args:
        endpoint: The server, and how often to reconnect.
        operation: Opens the stream.
        program_id: Where it is known before the first event.
        after: Sequence number of the last event before the stream.
        resumable: The program outlives a broken connection, so that the stream can go on where it broke.

    Attributes:
        program_id: Known at the latest after the first event.
        ready: Events that arrived and were not handed out.
        final: The program's last event, once it has arrived.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        operation: Operation[Any],
        *,
        program_id: str | None = None,
        after: int = -1,
        resumable: bool,
    ) -> None:
        self.program_id = program_id
        self.ready: deque[AnyEvent] = deque()
        self.final: ProgramCompleted | ProgramFailed | None = None
        self._endpoint = endpoint
        self._operation = operation
        self._last = after
        self._resumable = resumable
        self._attempt = 0
        self._decoder = SSEDecoder()

    def receive(self, chunk: bytes) -> None:
        """Take bytes of the answer's body.

        Raises:
            ServerError: An event cannot be read, or one is missing.
        """
        for message in self._decoder.feed(chunk):
            try:
                event = _EVENT.validate_json(message.data)
            except ValidationError as error:
                raise ServerError(
                    f"Cannot read event {message.data[:200]!r} of {self._name}: {error}. "
                    "Check that server and client are of the same version."
                ) from error
            if event.sequence <= self._last:
                continue  # sent again after a reconnect
            if event.sequence != self._last + 1:
                raise ServerError(
                    f"Event {event.sequence} of {self._name} came after event {self._last}: the server lost some."
                )
            if self.program_id is None and not isinstance(event, ProgramCreated):
                raise ServerError(f"{self._endpoint.root} began a program with {event.type}, not program.created.")
            self._last = event.sequence
            self._attempt = 0
            self.ready.append(event)
            if isinstance(event, ProgramCreated):
                self.program_id = event.program_id
            elif isinstance(event, ProgramCompleted | ProgramFailed):
                self.final = event

    def reconnect_wait_s(self, error: MacawError) -> float:
        """Seconds until the next try to go on after `error`; raises it where there is none."""
        if not self._resumable or self._attempt >= self._endpoint.max_reconnects:
            raise error
        self._decoder = SSEDecoder()
        self._attempt += 1
        return self._endpoint.wait_s(error, self._attempt - 1)

    def next_operation(self) -> Operation[Any]:
        """Opens the stream behind the last event.

        Before the first event that is the post again: its idempotency key finds the program.
        """
        if self.program_id is None:
            return self._operation
        return get_events(self.program_id, after=self._last)

    def cut_off(self) -> ConnectionFailedError:
        """The exception for a body that ended before the program did, or that was closed."""
        return ConnectionFailedError(f"The stream of {self._name} ended before the program did.")

    def result(self) -> dict[str, str]:
        """The targets' values by name.

        Raises:
            MacawError: The program failed.
            ConnectionFailedError: The stream was closed before the program's end.
        """
        if self.final is None:
            raise self.cut_off()
        if isinstance(self.final, ProgramFailed):
            raise self.final.error.to_exception()
        return self.final.variables

    @property
    def _name(self) -> str:
        return f"program {self.program_id or '(no id yet)'} at {self._endpoint.root}"
