"""Looking into the engine of the local server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from macaw_server.engine.types import EngineStats
from macaw_server.serve import LocalServer


@pytest.fixture
def engine_stats(local_server: LocalServer) -> Callable[[], EngineStats]:
    """The engine's counters, asked for on the server's own event loop."""

    def ask() -> EngineStats:
        assert local_server.service is not None
        engine = local_server.service.models.find(None).engine
        assert local_server.loop is not None
        return asyncio.run_coroutine_threadsafe(engine.stats(), local_server.loop).result()

    return ask


@pytest.fixture
def pages_in_use(engine_stats: Callable[[], EngineStats]) -> Callable[[], float]:
    """Pages that requests hold at the moment."""
    return lambda: engine_stats().pages_used
