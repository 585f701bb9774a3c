"""A program that is cancelled leaves the engine within two steps, with all its pages."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterable
from contextlib import closing

import pytest

from conftest import TENANTS
from macaw import MacawClient
from macaw_server.engine.core import EngineCore
from macaw_server.engine.types import EngineStats
from macaw_server.serve import LocalServer

NUM_CALLS = 64
SHARED = "A long preamble that only this program has, " * 8


def body(**fields: object) -> dict[str, object]:
    calls = [
        {
            "id": f"c{i}",
            "output": f"v{i}",
            "request": {"prompt": f"{SHARED} {i}", "max_tokens": 1200, "ignore_eos": True, "temperature": 0},
        }
        for i in range(NUM_CALLS)
    ]
    return {"calls": calls, "targets": [{"variable": f"v{i}", **fields} for i in range(NUM_CALLS)], "stream": True}


@pytest.fixture
def at_abort(monkeypatch: pytest.MonkeyPatch) -> list[EngineStats]:
    """The engine's counters at the moment at which it hears of a cancel."""
    heard: list[EngineStats] = []
    abort = EngineCore.abort

    def noting(core: EngineCore, request_ids: Iterable[str], *, keep_pages: bool) -> None:
        assert not keep_pages
        heard.append(core.stats())
        abort(core, request_ids, keep_pages=keep_pages)

    monkeypatch.setattr(EngineCore, "abort", noting)
    return heard


@pytest.mark.slow
@pytest.mark.parametrize("how", ["disconnect", "delete", "deadline"])
def test_64_running_calls_are_gone_within_two_steps(
    local_server: LocalServer,
    client: MacawClient,
    engine_stats: Callable[[], EngineStats],
    at_abort: list[EngineStats],
    how: str,
) -> None:
    before = engine_stats()
    program = body(deadline_ms=5000) if how == "deadline" else body()
    with closing(http.client.HTTPConnection(local_server.url.removeprefix("http://"))) as connection:
        headers = {"content-type": "application/json", "authorization": f"Bearer {TENANTS[0]}"}
        connection.request("POST", "/v1/programs", json.dumps(program), headers)
        response = connection.getresponse()
        assert response.status == 200
        while how != "deadline" and engine_stats().running < NUM_CALLS:
            assert not at_abort
        if how == "delete":
            running = next(state for state in client.list_programs() if state.status == "running")
            client.cancel(running.id)
        if how != "disconnect":
            assert b"program.failed" in response.read()
    while not at_abort:
        client.health()
    after = engine_stats()
    (heard,) = at_abort
    assert heard.running + heard.waiting == NUM_CALLS
    assert heard.pages_used > NUM_CALLS
    assert (after.running, after.waiting, after.pages_used) == (0, 0, 0)
    assert after.steps - heard.steps <= 2
    assert after.pages_cached <= before.pages_cached, "nothing that only this program used is kept"
