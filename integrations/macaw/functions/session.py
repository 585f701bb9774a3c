"""Sessions: where calls go, and for how long their program lives."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from contextvars import ContextVar, Token
from typing import Any, Self

from macaw.async_client import AsyncMacawClient
from macaw.errors import CancelledError
from macaw.functions.driver import Driver, cancel_unfinished
from macaw.functions.graph import Ask, Graph, Node, variables_in
from macaw.functions.program import Program
from macaw.functions.variable import Objective, SemanticVariable, checked_text, fail

_current: ContextVar[Session | None] = ContextVar("macaw_session", default=None)
_default: Session | None = None
_default_lock = threading.Lock()


class Session:
    """What is built within ``with session:`` or ``async with session:`` goes into one program on one server.

    Nothing is sent until something is asked for. Leaving the block ends the program: what nobody has waited for is
    cancelled, and an exception cancels everything. Blocks nest, and every thread and task has its own.

    Args:
        base_url: The server. Default: `MACAW_BASE_URL`, else ``http://127.0.0.1:8000/v1``.
        model: For functions that do not name one. Default: `MACAW_MODEL`, else the only one that is served.
        api_key: Default: `MACAW_API_KEY`, else none is sent.
        timeout_s: Longest silence of the server before `ConnectionFailedError`, seconds.
        max_concurrency: At most so many calls of the program at once.
        metadata: Labels, shown in the program's state.
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 600.0,
        max_concurrency: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._client = AsyncMacawClient(base_url, api_key, timeout_s=timeout_s)
        self._server: dict[str, Any] = {"base_url": base_url, "api_key": api_key, "timeout_s": timeout_s}
        self._model = model or os.environ.get("MACAW_MODEL") or None
        self._options: dict[str, Any] = {"max_concurrency": max_concurrency, "metadata": dict(metadata or {})}
        self._graph = Graph()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._driver: Driver | None = None
        self._token: Token[Session | None] | None = None
        self._ended = False

    @property
    def program(self) -> Program:
        """What has been built: a picture, and a timeline once it has been sent."""
        return Program(self._graph, self._driver.program_id if self._driver else None, self._server)

    def close(self) -> None:
        """End the session; the same as leaving its block."""
        self._end(cancel=False)

    async def aclose(self) -> None:
        """`close` for asyncio."""
        await self._aend(cancel=False)

    def __enter__(self) -> Self:
        self._enter()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        self._leave()
        self._end(cancel=exc_type is not None)

    async def __aenter__(self) -> Self:
        self._enter()
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        self._leave()
        await self._aend(cancel=exc_type is not None)

    # --------------------------------------------------------------------------------------------------------
    # For functions and variables

    def add(self, node: Node) -> None:
        """Build a call or a client step."""
        if self._ended:
            raise RuntimeError("This session has ended. Call functions within its block, or open another session.")
        self._graph.add(node)

    def check_inputs(self, function: str, values: Mapping[str, object]) -> None:
        """Refuse a future of another session: only its value can leave that.

        Raises:
            TypeError: There is one; the message names function and argument.
        """
        for argument, value in values.items():
            for variable in variables_in(value):
                if variable.session is not self and variable.session is not None and not variable.ready:
                    raise TypeError(
                        f"{function}(): argument {argument!r} is {variable.label} of another session, which has no "
                        "value yet. Ask for its value there first, or call both functions in one session."
                    )

    def ask(self, variable: SemanticVariable, objective: Objective, deadline_ms: float | None) -> None:
        """Send everything built so far, if it has not been sent; does not wait."""
        deadline_s = None if deadline_ms is None else time.monotonic() + deadline_ms / 1000
        self._graph.ask(variable, Ask(objective, deadline_s))
        with self._lock:
            if self._ended:
                fail(variable, CancelledError(f"{variable.label} has no value, and its session has ended."))
                return
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run, args=[self._loop], name="macaw-session", daemon=True)
                self._thread.start()
            self._submit(self._flush())

    def check_may_block(self, variable: SemanticVariable) -> None:
        """Raise RuntimeError where waiting would block the loop that has to bring the value."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return
        if running is self._loop:
            raise RuntimeError(
                f"{variable.label}: get() and stream() would block the event loop that this session runs on. Write "
                "``await variable``, ``await variable.aget(...)`` or ``async for piece in variable``."
            )

    # --------------------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        if self._driver is None:
            self._driver = Driver(self._client, self._graph, self._model, self._options)
        await self._driver.flush()

    def _submit(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _enter(self) -> None:
        if self._token is not None or self._ended:
            raise RuntimeError("A session is entered once. Open another one.")
        self._token = _current.set(self)

    def _leave(self) -> None:
        assert self._token is not None
        _current.reset(self._token)

    def _end(self, *, cancel: bool) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        if self._loop is not None:
            self._submit(self._close_driver(cancel)).result()
        if self._thread is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        cancel_unfinished(self._graph.nodes)

    async def _aend(self, *, cancel: bool) -> None:
        if self._thread is not None:  # it was not entered by ``async with``
            await asyncio.to_thread(self._end, cancel=cancel)
            return
        with self._lock:
            if self._ended:
                return
            self._ended = True
        await self._close_driver(cancel)
        cancel_unfinished(self._graph.nodes)

    async def _close_driver(self, cancel: bool) -> None:
        if self._driver is not None:
            await self._driver.close(cancel=cancel)


def session(
    base_url: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
    *,
    timeout_s: float = 600.0,
    max_concurrency: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Session:
    """Open a session, for ``with`` or ``async with``; see `Session`."""
    return Session(base_url, model, api_key, timeout_s=timeout_s, max_concurrency=max_concurrency, metadata=metadata)


def current_session() -> Session:
    """The innermost session around this code, or the process's own, made from the environment at first use."""
    global _default
    found = _current.get()
    if found is not None:
        return found
    with _default_lock:
        if _default is None or _default._ended:
            _default = Session()
            atexit.register(_default.close)
        return _default


def variable(name: str = "variable", *, value: str | None = None) -> SemanticVariable:
    """A text to pass to functions: known now, or set later with its `set`.

    Args:
        name: For pictures, timelines and messages.
        value: The text; None: `set` brings it.
    """
    if not isinstance(name, str) or not name or len(name) > 100 or any(c.isspace() for c in name):
        raise ValueError(f"variable name {name!r} is not one word. For a text, write variable(value=...).")
    if value is None:
        return SemanticVariable(name, session=current_session())
    return SemanticVariable(name, value=checked_text(value, f"variable {name!r}"))


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


def _forget_default_session() -> None:
    """A forked child has none of its parent's threads."""
    global _default
    _default = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_default_session)
