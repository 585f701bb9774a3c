"""Recording what a tenant's calls are like, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from macaw.errors import InvalidRequestError
from macaw_server.http.guard import authenticated
from macaw_server.service import ProgramService, Tenant
from macaw_server.service.traces import Recording, Traces

MIN_BLOCK_SIZE = 16
"""Numbers of shorter blocks would say more about a text than which beginnings are shared."""
MAX_BLOCK_SIZE = 65_536


class TraceEndpoints:
    """Handler of ``/v1/trace``."""

    def __init__(self, service: ProgramService) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Path and handler."""
        return [Route("/v1/trace", authenticated(self._service, self.record), methods=["GET"])]

    async def record(self, request: Request, tenant: Tenant) -> Response:
        """The tenant's calls as they end, until the reader leaves."""
        default = max(MIN_BLOCK_SIZE, *(model.engine.info.page_size for model in self._service.models))
        recording = self._service.traces.begin(tenant, _block_size(request, default))
        return _TraceStream(self._service.traces, recording, ping_s=self._service.config.ping_s)


class _TraceStream(EventSourceResponse):
    """Records as long as the connection lasts."""

    def __init__(self, traces: Traces, recording: Recording, *, ping_s: float) -> None:
        super().__init__(_events(recording), ping=ping_s, sep="\n")
        self._traces, self._recording = traces, recording

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the reader leaves or the server ends."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._traces.end(self._recording)


async def _events(recording: Recording) -> AsyncIterator[ServerSentEvent]:
    async for event in recording.events():
        yield ServerSentEvent(event.model_dump_json(exclude_none=True), event=event.type, sep="\n")


def _block_size(request: Request, default: int) -> int:
    value = request.query_params.get("block_size", str(default))
    if not value.isascii() or not value.isdecimal() or not MIN_BLOCK_SIZE <= int(value) <= MAX_BLOCK_SIZE:
        raise InvalidRequestError(
            f"block_size={value!r} is not accepted; give {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE:,} tokens. "
            f"The default is a page: {default}.",
            param="block_size",
        )
    return int(value)
