"""The asynchronous client: `macaw.client` with ``await``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from macaw import _transport
from macaw._stream import StreamState
from macaw.errors import ConnectionFailedError, MacawError, ServerError
from macaw.protocol import AnyEvent, ProgramGrowth, ProgramRequest, ProgramState

T = TypeVar("T")


class AsyncMacawClient:
    """`macaw.MacawClient` for asyncio: same names, same arguments, same errors. Use one per event loop."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 600.0,
        max_retries: int = 2,
        max_reconnects: int = 5,
        backoff_s: float = 0.5,
        http_client: httpx.AsyncClient | None = None,
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
        self._http = http_client or httpx.AsyncClient(**self._endpoint.http_options())

    async def run_program(self, request: ProgramRequest) -> ProgramState:
        """Run a program to its end. Its failure is in the state: `ProgramState.result` raises it."""
        return await self._send(_transport.post_program(request, stream=False))

    async def stream_program(self, request: ProgramRequest) -> AsyncProgramStream:
        """Start a program and follow its events; returns when the server has accepted it."""
        operation = _transport.post_program(request, stream=True)
        return await self._follow(operation, StreamState(self._endpoint, operation, resumable=request.detached))

    async def events(self, program_id: str, *, after: int = -1) -> AsyncProgramStream:
        """Follow a program's events behind sequence number `after`; all of them by default."""
        operation = _transport.get_events(program_id, after=after)
        state = StreamState(self._endpoint, operation, program_id=program_id, after=after, resumable=True)
        return await self._follow(operation, state)

    async def get_program(self, program_id: str) -> ProgramState:
        """A program's graph, values and timings as they are now."""
        return await self._send(_transport.get_program(program_id))

    async def list_programs(self) -> list[ProgramState]:
        """This API key's programs that the server still remembers."""
        return await self._send(_transport.list_programs())

    async def grow(self, program_id: str, growth: ProgramGrowth) -> None:
        """Add to the graph of a program that was posted with `open`, or close it."""
        await self._send(_transport.grow(program_id, growth))

    async def set_variable(self, program_id: str, name: str, value: str) -> None:
        """Give an external variable its value."""
        await self._send(_transport.set_variable(program_id, name, value))

    async def cancel(self, program_id: str) -> None:
        """Stop a program and free what it holds on the server."""
        await self._send(_transport.cancel(program_id))

    async def models(self) -> list[str]:
        """Names of the served models."""
        return await self._send(_transport.models())

    async def health(self) -> dict[str, Any]:
        """What the server says of itself."""
        return await self._send(_transport.health())

    async def close(self) -> None:
        """Close the connections, unless the HTTP client was passed in."""
        if self._owns_http:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def _send(self, operation: _transport.Operation[T]) -> T:
        return self._endpoint.parse(operation, await self._open(operation))

    async def _follow(self, operation: _transport.Operation[Any], state: StreamState) -> AsyncProgramStream:
        stream = AsyncProgramStream(self, state, await self._open(operation))
        try:
            await stream._wait_for_id()
        except BaseException:
            await stream.close()
            raise
        return stream

    async def _open(self, operation: _transport.Operation[Any]) -> httpx.Response:
        """Send a request, again while the server is overloaded; a stream's answer has its body unread."""
        attempt = 0
        while True:
            with self._endpoint.connection_errors():
                request = self._http.build_request(**self._endpoint.request_arguments(operation))
                response = await self._http.send(request, stream=operation.stream)
                if operation.is_answered_by(response):
                    return response
                await response.aread()
            error = _transport.error_from_response(response)
            await asyncio.sleep(self._endpoint.retry_wait_s(operation, error, attempt))
            attempt += 1


class AsyncProgramStream:
    """`macaw.ProgramStream` for asyncio: ``async for``, ``async with``; otherwise the same."""

    def __init__(self, client: AsyncMacawClient, state: StreamState, response: httpx.Response) -> None:
        self._client = client
        self._state = state
        self._closed = False
        self._attach(response)

    @property
    def program_id(self) -> str:
        """The program's id."""
        assert self._state.program_id is not None
        return self._state.program_id

    async def result(self) -> dict[str, str]:
        """Wait for the program's end and return the targets' values by name; see `ProgramStream.result`."""
        async for _ in self:
            pass
        return self._state.result()

    async def close(self) -> None:
        """Break the connection, if the program has not ended. Afterwards the stream has no more events."""
        self._closed = True
        await self._response.aclose()

    def __aiter__(self) -> AsyncIterator[AnyEvent]:
        return self

    async def __anext__(self) -> AnyEvent:
        while not self._closed:
            if self._state.ready:
                return self._state.ready.popleft()
            await self._advance()
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _attach(self, response: httpx.Response) -> None:
        self._response = response
        self._chunks = response.aiter_bytes()

    async def _wait_for_id(self) -> None:
        while self._state.program_id is None:
            await self._advance()

    async def _advance(self) -> None:
        """Read a chunk, or reconnect. The body is read to its end, so that the connection can be reused."""
        try:
            with self._client._endpoint.connection_errors():
                chunk = await anext(self._chunks, None)
            if chunk is None:
                raise self._state.cut_off()
        except ConnectionFailedError as error:
            if self._state.final is None:
                await self._reconnect(error)
            else:
                await self.close()
        else:
            self._state.receive(chunk)

    async def _reconnect(self, error: MacawError) -> None:
        await self._response.aclose()
        while True:
            await asyncio.sleep(self._state.reconnect_wait_s(error))
            try:
                return self._attach(await self._client._open(self._state.next_operation()))
            except (ConnectionFailedError, ServerError) as next_error:
                error = next_error
