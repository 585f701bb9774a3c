"""What engines answer, gathered by request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from macaw_server.engine.group import EngineGroup
from macaw_server.engine.process import EngineProcess
from macaw_server.engine.thread import EngineThread
from macaw_server.engine.types import Engine, EngineOutput, EngineRequest


class Collector:
    """Outputs of requests, and their ends."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: dict[str, list[EngineOutput]] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._news = asyncio.Event()

    def submit(self, request: EngineRequest) -> None:
        copy = EngineRequest(request.request_id, list(request.prompt_ids), request.sampling)
        self.outputs[request.request_id] = []
        self._ends[request.request_id] = asyncio.Event()
        self.engine.submit(copy, self._on_output)

    def _on_output(self, output: EngineOutput) -> None:
        self.outputs[output.request_id].append(output)
        if output.finish_reason is not None or output.error is not None:
            self._ends[output.request_id].set()
        self._news.set()

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    async def end(self, request_id: str) -> EngineOutput:
        await self._ends[request_id].wait()
        return self.outputs[request_id][-1]

    def ended(self, request_id: str) -> bool:
        return self._ends[request_id].is_set()

    async def some_output(self) -> None:
        self._news.clear()
        await self._news.wait()


@asynccontextmanager
async def running(engine: EngineProcess | EngineThread | EngineGroup) -> AsyncIterator[Collector]:
    await engine.start()
    try:
        yield Collector(engine)
    finally:
        await engine.stop()
    assert engine.status == "stopped"
