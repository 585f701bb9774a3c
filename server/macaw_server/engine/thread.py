"""The engine in a thread of this process: for tests and notebooks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from macaw_server.config import EngineConfig
from macaw_server.engine.handle import EngineHandle
from macaw_server.engine.loop import Inbound, Stop, run_loop
from macaw_server.engine.types import PublicPrefixes

if TYPE_CHECKING:
    from macaw_server.engine.core import EngineCore

T = TypeVar("T")


class EngineThread(EngineHandle):
    """An `Engine` in a thread; see `EngineHandle`. It shares this process's fate; nothing restarts it.

    `on_loading` is called in the loading thread.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_loading: Callable[[str], None] = lambda _: None,
        public_prefixes: PublicPrefixes = (),
    ) -> None:
        super().__init__(config, on_loading, public_prefixes)
        self._inbox: SimpleQueue[Inbound] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Load the model in a thread, then work in another."""
        from macaw_server.engine.core import EngineCore  # here and not above: it brings torch

        self._status = "starting"
        try:
            core = await asyncio.to_thread(EngineCore, self._config, self._on_loading, self._public_prefixes)
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
        self._send(Stop())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._answer_stats()

    def _send(self, message: Inbound) -> None:
        self._inbox.put(message)

    def _work(self, core: EngineCore, loop: asyncio.AbstractEventLoop) -> None:
        try:
            run_loop(core, self._inbox, lambda message: _post(loop, self._on_message, message))
        except Exception as e:
            _post(loop, self._on_failure, e)
            raise

    def _on_failure(self, error: Exception) -> None:
        self._status = "failed"
        self._answer_stats()
        self._table.fail_all(f"the engine is given up: {error}")


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[[T], None], argument: T) -> None:
    """Call back on the event loop; a loop that has ended needs no news."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback, argument)
