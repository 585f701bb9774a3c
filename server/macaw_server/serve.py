"""From a configuration to a running server: in the foreground (`macaw serve`), or in a thread (`LocalServer`)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import uvicorn
from rich.console import Console
from rich.markup import escape

from macaw_server.config import ServerConfig
from macaw_server.engine.devices import find_gpus, shares
from macaw_server.engine.group import EngineGroup
from macaw_server.engine.process import EngineProcess
from macaw_server.engine.thread import EngineThread
from macaw_server.engine.types import Engine
from macaw_server.errors import PortInUseError, StartupError
from macaw_server.http import create_app
from macaw_server.models.loader import DEMO_MODEL, load_tokenizer, resolve
from macaw_server.service import ProgramService, ServedModel, ServiceConfig
from macaw_server.service.tenants import read_tenants
from macaw_server.service.tools import check_parser
from macaw_server.shared_prefixes import SharedPrefix, read_shared_prefixes

CLOSE_CONNECTIONS_S = 5
"""How long connections may take to close when all programs have ended."""
KEEP_ALIVE_S = 60
"""How long an idle connection stays open: longer than clients keep theirs (httpx: 5 s), so that none sends a request
into a connection that is being closed."""


def run_server(config: ServerConfig, console: Console) -> None:
    """Serve until SIGTERM or Ctrl-C; a second signal does not wait for running programs.

    Raises:
        StartupError: The server cannot start; the message says why and what to do.
    """
    sock = bind(config.host, config.port)
    try:
        asyncio.run(_serve(config, sock, console))
    finally:
        sock.close()


def bind(host: str, port: int) -> socket.socket:
    """Take the port before the model loads, so that a port in use is said at once.

    Raises:
        PortInUseError: It is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol's number, as asyncio turns Nagle's algorithm off for no other sockets: without it, every
    # answer on a connection that was used before waits for the client's delayed acknowledgement (40 ms).
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as e:
        sock.close()
        if e.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"Port {port} on {host} is in use. Stop what listens there, or give another --port (0: a free one)."
            ) from e
        raise PortInUseError(f"Cannot listen on {host}:{port}: {e}. Give an address of this machine as --host.") from e
    return sock


def read_public(config: ServerConfig) -> list[SharedPrefix]:
    """The texts that are declared public, as tokens.

    Raises:
        StartupError: A file or the tokenizer cannot be read.
    """
    if not config.shared_prefix:
        return []
    return read_shared_prefixes(config.shared_prefix, load_tokenizer(config.engine()))


def make_engine(
    kind: type[EngineProcess] | type[EngineThread],
    config: ServerConfig,
    public: list[SharedPrefix],
    on_loading: Callable[[str], None] = lambda _: None,
) -> Engine:
    """One engine, or the group of `--engines`, not started."""
    prefixes = [prefix.token_ids for prefix in public]
    if config.engines == 1:
        return kind(config.engine(), on_loading, prefixes)

    def named(i: int) -> Callable[[str], None]:
        return lambda step: on_loading(f"engine {i}: {step}")

    members: list[EngineThread] | list[EngineProcess]
    if kind is EngineThread:  # all of one process, which sees one set of devices
        members = [EngineThread(config.engine(), named(i), prefixes) for i in range(config.engines)]
    else:
        members = [
            EngineProcess(share.config, named(i), prefixes, share.visible_gpus)
            for i, share in enumerate(shares(config.engine(), find_gpus()))
        ]
    return EngineGroup(members, config.placement, prefix_caching=config.prefix_caching)


async def load_service(config: ServerConfig, engine: Engine) -> ProgramService:
    """Start the engine, load the tokenizer meanwhile, and make the service over both.

    Raises:
        StartupError: The model cannot be served, or the tokenizer not be loaded; the engine is stopped then.
    """
    tenants = () if config.tenants is None else read_tenants(config.tenants)
    await asyncio.to_thread(resolve, config.engine())  # a folder that is not there is said at once
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(engine.start())
            loading = tasks.create_task(asyncio.to_thread(load_tokenizer, config.engine()))
    except BaseExceptionGroup as e:
        await engine.stop()
        raise e.exceptions[0] from None
    model = ServedModel(
        config.model_name,
        loading.result(),
        engine,
        created=int(time.time()),
        tool_call_parser=config.tool_call_parser,
    )
    try:
        check_parser(model)
    except StartupError:
        await engine.stop()
        raise
    return ProgramService(
        [model],
        ServiceConfig(
            api_keys=config.api_key,
            tenants=tenants,
            max_body_bytes=config.max_body_size,
            max_live_calls=config.max_live_calls,
            prefill_ahead=config.prefill_ahead and config.prefix_caching,
            pipelining=config.pipelining and config.prefix_caching,
        ),
    )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: who runs it decides when it ends, and is told when it has begun."""

    def __init__(self, service: ProgramService, log_level: str, on_started: Callable[[], object]) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                log_level=log_level,
                lifespan="off",
                timeout_graceful_shutdown=CLOSE_CONNECTIONS_S,
                timeout_keep_alive=KEEP_ALIVE_S,
                access_log=log_level == "debug",
            )
        )
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(config: ServerConfig, sock: socket.socket, console: Console) -> None:
    started = time.perf_counter()
    with console.status(f"loading {escape(config.model_name)}") as status:

        def on_loading(step: str) -> None:
            status.update(escape(step))
            console.print(f"[dim]{time.perf_counter() - started:6.1f} s  {escape(step)}[/]")

        public = await asyncio.to_thread(read_public, config)
        engine = make_engine(EngineProcess, config, public, on_loading)
        with _signals_end(engine, console):
            service = await load_service(config, engine)
    server = _Server(
        service,
        "warning" if config.log_level == "info" else config.log_level,
        on_started=lambda: _announce(config, service, public, sock, console, time.perf_counter() - started),
    )
    stopper = _Stopper(service, server, config.shutdown_timeout_s, console)
    gc.collect()
    gc.freeze()  # what is loaded stays: a full collection that visits it stops the event loop for 0.1 to 0.2 s
    try:
        await server.serve(sockets=[sock])
    finally:
        stopper.close()
        await service.close()
        await engine.stop()
        console.print("stopped")


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def _signals_end(engine: Engine, console: Console) -> Iterator[None]:
    """While the model loads, a signal ends the engine and this process: there is nothing to wait for.

    Not by unwinding: threads that load and import would be waited for, a minute on a busy machine.
    """
    loop = asyncio.get_running_loop()

    def end(number: signal.Signals) -> None:
        engine.kill()
        console.show_cursor()  # the spinner hides it
        console.print("stopped while loading")
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, end, number)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


class _Stopper:
    """On the first signal lets running programs end for a bounded time; on the second does not wait."""

    def __init__(self, service: ProgramService, server: _Server, timeout_s: float, console: Console) -> None:
        self._service, self._server, self._timeout_s, self._console = service, server, timeout_s, console
        self._task: asyncio.Task[None] | None = None
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def close(self) -> None:
        """Give the signals back."""
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._server.should_exit = self._server.force_exit = True
            return
        self._console.print(
            f"stopping: no new work, running programs have {self._timeout_s:g} s (once more to stop at once)"
        )
        self._task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain(self._timeout_s)
        self._server.should_exit = True


def _announce(
    config: ServerConfig,
    service: ProgramService,
    public: list[SharedPrefix],
    sock: socket.socket,
    console: Console,
    seconds: float,
) -> None:
    info = service.models.find(None).engine.info
    pool_bytes = info.num_pages * info.page_bytes
    where, each = info.device, ""
    if config.tensor_parallel_size > 1:
        where, each = f"{config.tensor_parallel_size} ranks of {info.device.partition(':')[0]}", " on each"
    facts: dict[str, Any] = {
        "model": f"{config.model_name} ({info.weight_bytes / 1e6:,.0f} MB of weights, {info.dtype} on {where})",
        "context": f"{info.max_model_len:,} tokens",
        "KV pool": f"{info.num_pages:,} pages of {info.page_size} tokens, {pool_bytes / 2**20:,.0f} MiB{each}",
        "tenants": len(service.tenants) or "no API keys: everybody who reaches the port is served",
        "ready in": f"{seconds:.1f} s",
    }
    for name, value in facts.items():
        console.print(f"  {name:9} {value}")
    for prefix in public:
        console.print(f"  public    {escape(prefix.describe(info.page_size))}")
    if config.load_format == "dummy":
        console.print("  [yellow]--load-format dummy: the weights are random, what the model writes is noise[/]")
    elif config.model == DEMO_MODEL:
        console.print("  [yellow]macaw-demo is very small: it summarises short notes like those of make demo[/]")
    console.print(f"Macaw is serving at {_url(sock)}/v1", style="bold")


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class LocalServer:
    """A whole server in this process, for tests and notebooks: ``with LocalServer() as server: server.url``.

    It listens on a free port of 127.0.0.1; the engine runs in a thread, so `torch.set_num_threads` of this process
    changes with it.

    Args:
        config: Fields of `ServerConfig`; `host` and `port` default to a free port of 127.0.0.1.

    Attributes:
        service: The programs; belongs to `loop`.
        loop: The server's event loop, which runs in a thread of its own.
    """

    def __init__(self, **config: Any) -> None:
        self.config = ServerConfig(**{"host": "127.0.0.1", "port": 0, **config})
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._server: _Server | None = None
        self.service: ProgramService | None = None

    @property
    def url(self) -> str:
        """Such as ``http://127.0.0.1:43211``; OpenAI clients take it with ``/v1`` behind."""
        if self._socket is None:
            raise RuntimeError("the server is not running; call start(), or use it in a with statement")
        return _url(self._socket)

    def start(self) -> Self:
        """Load the model and listen; returns when requests are answered.

        Raises:
            StartupError: As for `macaw serve`.
        """
        self._socket = bind(self.config.host, self.config.port)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="macaw-server", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            self._socket.close()
            raise self._failure
        return self

    def stop(self) -> None:
        """Cancel what runs, and stop."""
        if self.loop is not None and self._thread is not None:
            asyncio.run_coroutine_threadsafe(self._end(), self.loop)
            self._thread.join()
        if self._socket is not None:
            self._socket.close()
        self._socket = self._thread = self.loop = self._server = None

    async def _main(self) -> None:
        try:
            public = await asyncio.to_thread(read_public, self.config)
            kind: type[EngineProcess] | type[EngineThread] = EngineThread
            if self.config.engines > 1:  # torch's defaults, which loading sets, are the whole process's
                kind = EngineProcess
            engine = make_engine(kind, self.config, public)
            self.service = await load_service(self.config, engine)
        except BaseException as e:
            self._failure = e
            self._ready.set()
            return
        assert self._socket is not None
        self.loop = asyncio.get_running_loop()
        self._server = _Server(self.service, "warning", on_started=self._ready.set)
        await self._server.serve(sockets=[self._socket])
        await engine.stop()

    async def _end(self) -> None:
        assert self.service is not None
        assert self._server is not None
        await self.service.close()  # ends the programs, and with them the streams that uvicorn would wait for
        self._server.should_exit = True

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
