"""Answers that last as long as a program: server-sent events, and waiting for its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from macaw_server.service import ProgramRun

# sse-starlette would cut every stream at the first signal. Draining ends the programs, and so their streams.
AppStatus.enable_automatic_graceful_drain = False


class ProgramStream(EventSourceResponse):
    """A stream that counts as a client of its program as long as the connection lasts, from before its start.

    Args:
        run: The program.
        content: Events to send.
        ping_s: Seconds between comments that keep the connection alive.
    """

    def __init__(self, run: ProgramRun, content: AsyncIterator[ServerSentEvent], *, ping_s: float) -> None:
        super().__init__(content, ping=ping_s, sep="\n")
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the program ends or the client leaves."""
        with self._run.attached():
            await super().__call__(scope, receive, send)


async def program_events(run: ProgramRun, after: int) -> AsyncIterator[ServerSentEvent]:
    """A program's events: the type as the event's name, the sequence number as its id."""
    async for event in run.events(after):
        data = event.model_dump_json(exclude_none=True)
        yield ServerSentEvent(data, event=event.type, id=str(event.sequence), sep="\n")


async def wait_for_end(run: ProgramRun, request: Request) -> bool:
    """Wait for a program on behalf of a client; whether it has ended, rather than the client gone.

    The request's body must have been read.
    """
    with run.attached():
        end = asyncio.ensure_future(run.wait())
        gone = asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait((end, gone), return_when=asyncio.FIRST_COMPLETED)
            return end.done()
        finally:
            end.cancel()
            gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
