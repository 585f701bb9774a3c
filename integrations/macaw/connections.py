"""Connections, shared by all models of the process.

httpx's connections belong to the event loop they were opened in, while a model is used from whichever loop
comes: `asyncio.run` makes a new one each time, tests one per test. So the asynchronous client has a pool for
each loop.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
from collections.abc import AsyncGenerator
from contextlib import suppress

import httpx

TIMEOUT = httpx.Timeout(600.0, connect=10.0)
# Idle connections are dropped before uvicorn does so (after 5 s): no request goes out on one that is being
# closed.
LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100, keepalive_expiry=4.0)


class PerLoopTransport(httpx.AsyncBaseTransport):
    """An `httpx.AsyncHTTPTransport` for each event loop, closed when the loop is about to close."""

    def __init__(self) -> None:
        self._pools: dict[asyncio.AbstractEventLoop, httpx.AsyncHTTPTransport] = {}
        self._closers: dict[asyncio.AbstractEventLoop, AsyncGenerator[None]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` over this loop's connections."""
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            self._pools[loop] = httpx.AsyncHTTPTransport(limits=LIMITS)
            # `asyncio.run` ends a loop by closing its suspended asynchronous generators: the hook to close
            # the pool.
            self._closers[loop] = self._close_with(loop)
            await anext(self._closers[loop])
            self._close_before(loop)
        return await self._pools[loop].handle_async_request(request)

    async def aclose(self) -> None:
        """Close this loop's connections."""
        if closer := self._closers.get(asyncio.get_running_loop()):
            await closer.aclose()

    def _close_before(self, loop: asyncio.AbstractEventLoop) -> None:
        """Others just close the loop, as LlamaIndex does with those that it runs in threads."""
        close = loop.close

        def close_pool_and_loop() -> None:
            if closer := self._closers.get(loop):
                with suppress(RuntimeError):  # another loop runs in this thread
                    loop.run_until_complete(closer.aclose())
            close()

        with suppress(AttributeError):  # a loop that is not written in Python may not take it
            loop.close = close_pool_and_loop  # type: ignore[method-assign]

    async def _close_with(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            del self._closers[loop]
            await self._pools.pop(loop).aclose()


@functools.cache
def shared_client() -> httpx.Client:
    """The client of models that were given none. Proxy variables of the environment are not read."""
    client = httpx.Client(transport=httpx.HTTPTransport(limits=LIMITS), timeout=TIMEOUT, follow_redirects=True)
    atexit.register(client.close)
    return client


@functools.cache
def shared_async_client() -> httpx.AsyncClient:
    """The asynchronous client of models that were given none, for any number of event loops."""
    return httpx.AsyncClient(transport=PerLoopTransport(), timeout=TIMEOUT, follow_redirects=True)
