"""The engine in a process of its own, supervised: when it dies it is started again and its requests go on."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue

from macaw_server.config import EngineConfig
from macaw_server.engine.handle import EngineHandle
from macaw_server.engine.loop import Add, Inbound, LoadFailed, Loading, Outbound, Outputs, Ready, Stop, run_loop
from macaw_server.engine.ranks import Ranks, Seat
from macaw_server.engine.types import EngineInfo, EngineStats, PublicPrefixes
from macaw_server.errors import ModelLoadError, StartupError

log = logging.getLogger(__name__)

MAX_CRASHES_PER_REQUEST = 3
"""A request that was in the engine at so many crashes fails."""
MAX_RESTARTS_IN_A_ROW = 5
"""The engine is given up after so many deaths without a single output in between."""
STOP_TIMEOUT_S = 5.0
"""How long a stopped engine may finish its step before it is killed."""


def _worker(
    config: EngineConfig, pipe: Connection, seat: Seat, *, public_prefixes: PublicPrefixes, visible_gpus: str | None
) -> None:
    """Main function of each of the engine's processes."""
    if visible_gpus is not None:  # CUDA reads it once, when it is first used
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the server decides when we stop
    several = config.tensor_parallel_size > 1
    name = f"engine rank {seat.rank}" if several else "engine"
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s {name} %(levelname)s %(message)s")
    inbox: SimpleQueue[Inbound] = SimpleQueue()

    def read() -> None:
        try:
            while True:
                inbox.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # the server is gone, so nobody waits for this process

    # Before the imports, which take seconds: a server that is killed meanwhile must not leave an engine behind that
    # holds its standard error open.
    threading.Thread(target=read, name="engine-inbox", daemon=True).start()

    def on_loading(step: str) -> None:
        if seat.rank == 0:
            pipe.send(Loading(step))

    from macaw_server.engine.core import EngineCore
    from macaw_server.engine.tensor_parallel import TensorParallel

    try:
        ranks = TensorParallel(config, seat) if several else None
        core = EngineCore(config, on_loading, public_prefixes, ranks=ranks)
    except StartupError as e:
        pipe.send(LoadFailed(e))
        return
    except Exception as e:
        log.exception("loading %s", config.model)
        pipe.send(LoadFailed(ModelLoadError(f"Loading {config.model} failed: {type(e).__name__}: {e}")))
        return
    gc.freeze()  # the model's objects live as long as the process: collections need not visit them
    if seat.rank == 0:
        pipe.send(Ready(core.info))
        run_loop(core, inbox, pipe.send)
    else:
        core.follow()
    if ranks is not None:
        ranks.leave()


class EngineProcess(EngineHandle):
    """An `Engine` in a supervised process, or in one for each rank; see `EngineHandle`.

    `visible_gpus` is the value of ``CUDA_VISIBLE_DEVICES`` for its processes, if they are to have one of their own.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_loading: Callable[[str], None] = lambda _: None,
        public_prefixes: PublicPrefixes = (),
        visible_gpus: str | None = None,
    ) -> None:
        super().__init__(config, on_loading, public_prefixes)
        self._visible_gpus = visible_gpus
        self._ranks: Ranks | None = None
        self._burial: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._restarts = 0
        self._deaths_in_a_row = 0

    @property
    def pid(self) -> int | None:
        """Process id of the engine, for people and for tests that kill it."""
        return self.pids[0] if self.pids else None

    @property
    def pids(self) -> list[int | None]:
        """Process ids by rank."""
        return [process.pid for process, _ in self._ranks.members] if self._ranks else []

    async def start(self) -> None:
        """Start the process and wait until the model is loaded."""
        self._status = "starting"
        self._ready = asyncio.get_running_loop().create_future()
        self._spawn()
        await self._ready

    async def stop(self) -> None:
        """Stop the process: politely, then for sure."""
        failed, self._status = self._status == "failed", "stopped"
        self._send(Stop())
        if self._burial is not None:
            await self._burial
        if self._ranks is not None:
            await asyncio.to_thread(self._ranks.join, 0 if failed else STOP_TIMEOUT_S)
            await asyncio.to_thread(self._ranks.kill)
        self._answer_stats()

    def kill(self) -> None:
        """Stop the process for sure, without waiting for anything."""
        self._status = "stopped"
        if self._ranks is not None:
            self._ranks.kill()

    async def stats(self) -> EngineStats:
        """The engine's counters since it was last started, and how often that was."""
        stats = await super().stats()
        stats.restarts = self._restarts
        return stats

    def _spawn(self) -> None:
        # Threads that spin while they wait for each other starve on a core that the HTTP side needs too; OpenMP
        # reads this once, when the child imports torch.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        worker = partial(_worker, public_prefixes=self._public_prefixes, visible_gpus=self._visible_gpus)
        self._ranks = Ranks(worker, self._config)
        for _, pipe in self._ranks.members:
            args = (self._ranks, pipe, asyncio.get_running_loop())
            threading.Thread(target=self._read, args=args, name="engine-outbox", daemon=True).start()

    def _read(self, ranks: Ranks, pipe: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """Runs in a thread: messages of one process, in order, then its end."""
        try:
            while True:
                loop.call_soon_threadsafe(self._receive, ranks, pipe.recv())
        except (EOFError, OSError):
            pass
        except Exception:  # a message cut off in the middle by a kill does not unpickle
            log.debug("the engine's last message is broken", exc_info=True)
        try:
            loop.call_soon_threadsafe(self._on_death, ranks, pipe)
        except RuntimeError:
            log.debug("the event loop ended before the engine")
            pipe.close()

    def _send(self, message: Inbound) -> None:
        try:
            if self._ranks is not None:
                self._ranks.leader.pipe.send(message)
        except OSError:  # it is dying; what it does not hear now it is told again after the restart
            log.debug("the engine did not hear %s", type(message).__name__)

    def _receive(self, ranks: Ranks, message: Outbound) -> None:
        if ranks is self._ranks:  # else one of them has died, and what the others still say is said again
            self._on_message(message)

    def _on_message(self, message: Outbound) -> None:
        match message:
            case Loading(step):
                self._on_loading(step)
            case Ready(info):
                self._on_ready(info)
            case LoadFailed(error):
                self._give_up(error)
            case _:
                if isinstance(message, Outputs):
                    self._deaths_in_a_row = 0
                super()._on_message(message)

    def _on_ready(self, info: EngineInfo) -> None:
        self._info = info
        if self._status == "restarting":
            requests = self._table.requests()
            log.warning("the engine is back; taking up %d calls again", len(requests))
            for request in requests:
                self._send(Add(request))
        self._status = "running"
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def _on_death(self, ranks: Ranks, pipe: Connection) -> None:
        pipe.close()  # here, where nobody writes to it meanwhile
        if ranks is not self._ranks or self._status == "stopped":
            return
        self._ranks = None  # one rank without the others is no engine
        self._answer_stats()
        self._withdrawn.clear()
        self._table.crashed(MAX_CRASHES_PER_REQUEST)
        self._deaths_in_a_row += 1
        if self._status == "starting":
            self._give_up(ModelLoadError(f"The engine process died while loading {self._config.model}."))
        elif self._deaths_in_a_row > MAX_RESTARTS_IN_A_ROW:
            self._give_up(RuntimeError(f"the engine died {self._deaths_in_a_row} times in a row"))
        elif self._status != "failed":
            log.error("the engine process died (%d in a row); starting it again", self._deaths_in_a_row)
            self._status = "restarting"
            self._restarts += 1
            self._hand_over()
        self._burial = asyncio.create_task(self._bury(ranks))

    async def _bury(self, ranks: Ranks) -> None:
        """See that no rank is left, and start again if that is what is to be done."""
        await asyncio.to_thread(ranks.kill)
        if self._status == "restarting":
            self._spawn()

    def _hand_over(self) -> None:
        if self.on_lost is not None:
            self.on_lost(self._table.take_all())

    def _give_up(self, error: Exception) -> None:
        if self._status == "failed":  # every rank says so
            return
        starting, self._status = self._status == "starting", "failed"
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
        elif not starting:
            log.error("the engine is given up: %s", error)
            self._hand_over()
        self._table.fail_all(f"the engine is given up: {error}")
