"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from macaw import _transport
from macaw._stream import StreamState
from macaw.errors import ConnectionFailedError, MacawError, ServerError
from macaw.protocol import AnyEvent, ProgramGrowth, ProgramRequest, ProgramState

T = TypeVar("T")


class MacawClient:
    """Talks to a Macaw server. Safe to use from several threads.

    A method raises a `MacawError` when its request fails. A *program* that fails is no exception until its
    result is asked for: see `ProgramState.result` and `ProgramStream.result`.

    Args:
        base_url: The server, with or without ``/v1``. Default: `MACAW_BASE_URL`, else ``http://127.0.0.1:8000/v1``.
        api_key: Default: `MACAW_API_KEY`, else none is sent.
        timeout_s: Longest silence of the server before `ConnectionFailedError`, seconds.
        max_retries: How often a program is posted again when the server is overloaded. Every post carries an
            idempotency key, so it never runs twice.
        max_reconnects: How often in a row a detached program's broken stream is taken up again.
        backoff_s: First wait before these, where the server does not say how long, seconds.
        http_client: To be used instead of an own one; `close` leaves it open.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 600.0,
        max_retries: int = 2,
        max_reconnects: int = 5,
        backoff_s: float = 0.5,
        http_client: httpx.Client | None = None,
    ) -> None:
        self._endpoint = _transport.Endpoint.resolve(
            base_url,
            api_key,
            timeout_s=timeout_s,
            max_retries=max_retries,
            max_reconnects=max_reconnects,
            backoff_s=backoff_s,
        )
        self._owns_http = http_client is None
        self._http = http_client or httpx.Client(**self._endpoint.http_options())

    def run_program(self, request: ProgramRequest) -> ProgramState:
        """Run a program to its end. Its failure is in the state: `ProgramState.result` raises it."""
        return self._send(_transport.post_program(request, stream=False))

    def stream_program(self, request: ProgramRequest) -> ProgramStream:
        """Start a program and follow its events; returns when the server has accepted it."""
        operation = _transport.post_program(request, stream=True)
        return self._follow(operation, StreamState(self._endpoint, operation, resumable=request.detached))

    def events(self, program_id: str, *, after: int = -1) -> ProgramStream:
        """Follow a program's events behind sequence number `after`; all of them by default."""
        operation = _transport.get_events(program_id, after=after)
        state = StreamState(self._endpoint, operation, program_id=program_id, after=after, resumable=True)
        return self._follow(operation, state)

    def get_program(self, program_id: str) -> ProgramState:
        """A program's graph, values and timings as they are now."""
        return self._send(_transport.get_program(program_id))

    def list_programs(self) -> list[ProgramState]:
        """This API key's programs that the server still remembers."""
        return self._send(_transport.list_programs())

    def grow(self, program_id: str, growth: ProgramGrowth) -> None:
        """Add to the graph of a program that was posted with `open`, or close it."""
        self._send(_transport.grow(program_id, growth))

    def set_variable(self, program_id: str, name: str, value: str) -> None:
        """Give an external variable its value."""
        self._send(_transport.set_variable(program_id, name, value))

    def cancel(self, program_id: str) -> None:
        """Stop a program and free what it holds on the server."""
        self._send(_transport.cancel(program_id))

    def models(self) -> list[str]:
        """Names of the served models."""
        return self._send(_transport.models())

    def health(self) -> dict[str, Any]:
        """What the server says of itself."""
        return self._send(_transport.health())

    def close(self) -> None:
        """Close the connections, unless the HTTP client was passed in."""
        if self._owns_http:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _send(self, operation: _transport.Operation[T]) -> T:
        return self._endpoint.parse(operation, self._open(operation))

    def _follow(self, operation: _transport.Operation[Any], state: StreamState) -> ProgramStream:
        stream = ProgramStream(self, state, self._open(operation))
        try:
            stream._wait_for_id()
        except BaseException:
            stream.close()
            raise
        return stream

    def _open(self, operation: _transport.Operation[Any]) -> httpx.Response:
        """Send a request, again while the server is overloaded; a stream's answer has its body unread."""
        attempt = 0
        while True:
            with self._endpoint.connection_errors():
                request = self._http.build_request(**self._endpoint.request_arguments(operation))
                response = self._http.send(request, stream=operation.stream)
                if operation.is_answered_by(response):
                    return response
                response.read()
            error = _transport.error_from_response(response)
            time.sleep(self._endpoint.retry_wait_s(operation, error, attempt))
            attempt += 1


class ProgramStream:
    """The events of one program, as they come; ends after `ProgramCompleted` or `ProgramFailed`.

    Use it in a ``with`` block, or exhaust it: closing it earlier breaks the connection, by which the server
    cancels a program that is not detached. Where the connection breaks by itself, the stream of a detached
    program and one from `MacawClient.events` reconnect and go on without loss; others raise
    `ConnectionFailedError`.
    """

    def __init__(self, client: MacawClient, state: StreamState, response: httpx.Response) -> None:
        self._client = client
        self._state = state
        self._closed = False
        self._attach(response)

    @property
    def program_id(self) -> str:
        """The program's id."""
        assert self._state.program_id is not None
        return self._state.program_id

    def result(self) -> dict[str, str]:
        """Wait for the program's end and return the targets' values by name.

        Events that were not taken by then are dropped.

        Raises:
            MacawError: The program failed; the class says how.
            ConnectionFailedError: The connection broke, or the stream was closed before the program's end.
        """
        for _ in self:
            pass
        return self._state.result()

    def close(self) -> None:
        """Break the connection, if the program has not ended. Afterwards the stream has no more events."""
        self._closed = True
        self._response.close()

    def __iter__(self) -> Iterator[AnyEvent]:
        return self

    def __next__(self) -> AnyEvent:
        while not self._closed:
            if self._state.ready:
                return self._state.ready.popleft()
            self._advance()
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _attach(self, response: httpx.Response) -> None:
        self._response = response
        self._chunks = response.iter_bytes()

    def _wait_for_id(self) -> None:
        while self._state.program_id is None:
            self._advance()

    def _advance(self) -> None:
        """Read a chunk, or reconnect. The body is read to its end, so that the connection can be reused."""
        try:
            with self._client._endpoint.connection_errors():
                chunk = next(self._chunks, None)
            if chunk is None:
                raise self._state.cut_off()
        except ConnectionFailedError as error:
            if self._state.final is None:
                self._reconnect(error)
            else:
                self.close()
        else:
            self._state.receive(chunk)

    def _reconnect(self, error: MacawError) -> None:
        self._response.close()
        while True:
            time.sleep(self._state.reconnect_wait_s(error))
            try:
                return self._attach(self._client._open(self._state.next_operation()))
            except (ConnectionFailedError, ServerError) as next_error:
                error = next_error
