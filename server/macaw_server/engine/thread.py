"""The engine in a thread of this process: for tests and notebooks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal, TypeVar

from macaw_server.config import EngineConfig
from macaw_server.engine.inflight import InflightTable, OnOutput
from macaw_server.engine.loop import Abort, Add, GetStats, Inbound, Outbound, Outputs, Stats, Stop, run_loop
from macaw_server.engine.types import EngineInfo, EngineRequest, EngineStats

if TYPE_CHECKING:
    from macaw_server.engine.core import EngineCore

T = TypeVar("T")


class EngineThread:
    """An `Engine` in a thread. It shares this process's fate; nothing restarts it.

    Args:
        config: What to load and how.
        on_loading: Told, in the loading thread, what the engine is busy with while it loads.
    """

    def __init__(self, config: EngineConfig, on_loading: Callable[[str], None] = lambda _: None) -> None:
        self._config = config
        self._on_loading = on_loading
        self._table = InflightTable()
        self._inbox: SimpleQueue[Inbound] = SimpleQueue()
        self._info: EngineInfo | None = None
        self._status: Literal["starting", "running", "restarting", "failed", "stopped"] = "stopped"
        self._thread: threading.Thread | None = None
        self._stats = EngineStats()
        self._asked: list[asyncio.Future[EngineStats]] = []

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model."""
        if self._info is None:
            raise RuntimeError("the engine has not started")
        return self._info

    @property
    def status(self) -> Literal["starting", "running", "restarting", "failed", "stopped"]:
        """Whether requests are being worked on."""
        return self._status

    async def start(self) -> None:
        """Load the model in a thread, then work in another."""
        from macaw_server.engine.core import EngineCore  # here and not above: it brings torch

        self._status = "starting"
        try:
            core = await asyncio.to_thread(EngineCore, self._config, self._on_loading)
        except BaseException:
            self._status = "failed"
            raise
        self._info = core.info
        args = (core, asyncio.get_running_loop())
        self._thread = threading.Thread(target=self._work, args=args, name="macaw-engine", daemon=True)
        self._thread.start()
        self._status = "running"

    async def stop(self) -> None:
        """Stop after the current step."""
        self._status = "stopped"
        self._inbox.put(Stop())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        for future in self._asked:
            if not future.done():
                future.set_result(self._stats)

    def submit(self, request: EngineRequest, on_output: OnOutput) -> None:
        """Queue a request."""
        self._table.add(request, on_output)
        if self._status == "running":
            self._inbox.put(Add(request))
        else:
            message = "the engine is gone; see the server's log"
            asyncio.get_running_loop().call_soon(self._table.fail, request.request_id, message)

    def abort(self, request_id: str) -> None:
        """Forget a request."""
        if self._table.remove(request_id):
            self._inbox.put(Abort(request_id))

    async def stats(self) -> EngineStats:
        """The engine's counters."""
        if self._status == "running":
            self._asked.append(asyncio.get_running_loop().create_future())
            self._inbox.put(GetStats())
            self._stats = await self._asked[-1]
        return self._stats

    def _work(self, core: EngineCore, loop: asyncio.AbstractEventLoop) -> None:
        try:
            run_loop(core, self._inbox, lambda message: _post(loop, self._on_message, message))
        except Exception as e:
            _post(loop, self._on_failure, e)
            raise

    def _on_message(self, message: Outbound) -> None:
        match message:
            case Outputs(outputs):
                self._table.deliver(outputs)
            case Stats(stats):
                asked, self._asked = self._asked, []
                for future in asked:
                    if not future.done():
                        future.set_result(stats)

    def _on_failure(self, error: Exception) -> None:
        self._status = "failed"
        self._table.fail_all(f"the engine is given up: {error}")


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[[T], None], argument: T) -> None:
    """Call back on the event loop; a loop that has ended needs no news."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback, argument)
