"""`macaw trace record`: follows one or several recordings of a server, and writes what they tell as one trace."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
from pydantic import ValidationError

from macaw._sse import SSEDecoder
from macaw._transport import Endpoint, error_from_response
from macaw.errors import NotFoundError
from macaw.protocol import TRACE_EVENT, TracedCall, TraceLost, TraceStarted
from macaw_server.traces.lines import Totals, TraceLines
from macaw_server.workloads import read_trace, write_trace

SILENCE_S = 120.0
"""A server says something every few seconds."""
GRACE_S = 0.5
"""A recording that was silent for so long has told everything, when nothing more happens."""
MAX_GRACES = 10


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """As the command's help says.

    Attributes:
        url: None is `MACAW_BASE_URL`, or this machine's usual port.
        api_keys: One recording each; none at all is `MACAW_API_KEY`, or no key.
        out: The file.
        block_size: None is the server's page.
    """

    url: str | None
    api_keys: Sequence[str]
    out: Path
    block_size: int | None = None


class RecordError(Exception):
    """A recording cannot go on, or cannot begin."""


async def record(
    options: RecordOptions, stop: Callable[[], Awaitable[object]], on_started: Callable[[str], None]
) -> Totals:
    """Record until `stop` returns, or the server ends.

    Lines are written as calls end, so that the file is a trace whatever happens; at the end they are put in order.

    Args:
        options: See there.
        stop: Called when everything is being recorded.
        on_started: Told the server's URL then.

    Raises:
        RecordError: The server has no recordings, or broke one off; what was recorded is in the file.
        MacawError: The server cannot be reached, or refuses.
        OSError: The file cannot be written.
    """
    keys: Sequence[str | None] = options.api_keys or [None]
    endpoints = [
        Endpoint.resolve(options.url, key, timeout_s=SILENCE_S, max_retries=0, max_reconnects=0, backoff_s=0.0)
        for key in keys
    ]
    with options.out.open("w", encoding="utf-8") as file:
        recorder = _Recorder(file, len(endpoints))
        try:
            async with asyncio.TaskGroup() as tasks:
                readers = [tasks.create_task(_follow(each, options.block_size, recorder)) for each in endpoints]
                await recorder.all_started.wait()
                on_started(endpoints[0].root)
                stopping = tasks.create_task(_stopped(stop, recorder))
                await asyncio.wait([stopping, tasks.create_task(_all_ended(readers))], return_when="FIRST_COMPLETED")
                for task in [stopping, *readers]:
                    task.cancel()
        except ExceptionGroup as e:
            raise e.exceptions[0] from None
        finally:
            file.close()
            if recorder.lines is not None and recorder.lines.totals.num_calls:
                _put_in_order(options.out, recorder.lines.block_size)
    return recorder.lines.totals if recorder.lines is not None else Totals()


class _Recorder:
    """Takes the events of all recordings, and writes the lines."""

    def __init__(self, file: IO[str], num_recordings: int) -> None:
        self.lines: TraceLines | None = None
        self.all_started = asyncio.Event()
        self.num_events = 0
        self._file, self._num_recordings = file, num_recordings
        self._start_ms = 0.0
        self._tenants: set[str] = set()

    def start(self, event: TraceStarted) -> None:
        if event.tenant in self._tenants:
            raise RecordError(
                "Two of the API keys are of one tenant, whose calls would be there twice. Give one of them."
            )
        if self.lines is None:
            self.lines, self._start_ms = TraceLines(event.block_size), event.now_ms
        self._tenants.add(event.tenant)
        if len(self._tenants) == self._num_recordings:
            self.all_started.set()

    def add(self, tenant: str, event: TracedCall | TraceLost) -> None:
        assert self.lines is not None
        self.num_events += 1
        if isinstance(event, TraceLost):
            self.lines.totals.num_lost += event.num_calls
            return
        for line in self.lines.add(tenant, event, self._start_ms):
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()


async def _follow(endpoint: Endpoint, block_size: int | None, recorder: _Recorder) -> None:
    """One recording, to its end."""
    started: TraceStarted | None = None
    async for event in _events(endpoint, block_size):
        if isinstance(event, TraceStarted):
            started = event
            recorder.start(event)
        elif started is not None:
            recorder.add(started.tenant, event)
    if started is None:
        raise RecordError(f"{endpoint.root} ended the recording before it began. See whether the server is ending.")


async def _events(endpoint: Endpoint, block_size: int | None) -> AsyncIterator[TraceStarted | TracedCall | TraceLost]:
    url, params = f"{endpoint.root}/v1/trace", {} if block_size is None else {"block_size": block_size}
    decoder = SSEDecoder()
    async with httpx.AsyncClient(timeout=httpx.Timeout(SILENCE_S, connect=10.0)) as http:
        with endpoint.connection_errors():
            async with http.stream("GET", url, params=params, headers=endpoint.headers) as response:
                kind = str(response.headers.get("content-type", ""))
                if not response.is_success:
                    await response.aread()
                    raise _refusal(endpoint, response)
                if not kind.startswith("text/event-stream"):
                    raise RecordError(f"{url} answered with {kind or 'no content type'}, which no Macaw server does.")
                async for data in response.aiter_raw():
                    for event in decoder.feed(data):
                        try:
                            yield TRACE_EVENT.validate_json(event.data)
                        except ValidationError as e:
                            raise RecordError(f"{url} sent what this version does not know: {e}.") from e


def _refusal(endpoint: Endpoint, response: httpx.Response) -> Exception:
    error = error_from_response(response)
    if isinstance(error, NotFoundError):
        return RecordError(
            f"{endpoint.root} has no /v1/trace: it is no Macaw server, or an older one. Give the URL of one that runs."
        )
    return error


async def _stopped(stop: Callable[[], Awaitable[object]], recorder: _Recorder) -> None:
    """Wait for the end, and then for what is on its way."""
    await stop()
    for _ in range(MAX_GRACES):
        seen = recorder.num_events
        await asyncio.sleep(GRACE_S)
        if seen == recorder.num_events:
            return


async def _all_ended(tasks: Iterable[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks)


def _put_in_order(path: Path, block_size: int) -> None:
    """By arrival, the lines of a program together, and blocks numbered in this order."""
    ordered = path.with_name(f"{path.name}.ordered")
    write_trace(read_trace(path), ordered, block_size)
    ordered.replace(path)
