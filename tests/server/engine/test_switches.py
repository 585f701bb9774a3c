"""Each of the scheduler's and the cache's mechanisms off, on a real engine: other work, and the same answers."""

from __future__ import annotations

from typing import Any

import pytest

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.types import CallClass, CallHints, EngineRequest, SamplingParams

PREFIX = [100 + i % 50 for i in range(96)]
NUM_CALLS = 5
CONFIG = EngineConfig(
    dtype="float32",
    max_model_len=256,
    max_num_seqs=4,
    max_num_batched_tokens=512,
    kv_memory=2**20,
    sharing="always",
    latency_slowdown=1.5,
)


def answers(core: EngineCore) -> dict[str, list[int]]:
    """Of calls with one prefix, all at once but for the last: chats among the members of a group."""
    tokens: dict[str, list[int]] = {}

    def finish() -> None:
        while core.has_work:
            for output in core.step():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)

    for i in range(NUM_CALLS):
        if i == NUM_CALLS - 1:
            finish()
        hints = CallHints(program_id=str(i), call_class=CallClass.LATENCY if i % 2 else CallClass.GROUP)
        sampling = SamplingParams(max_tokens=24, temperature=0)
        core.add(EngineRequest(str(i), [*PREFIX, 7 + i, 9, 11], sampling, hints=hints))
    finish()
    return tokens


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    return answers(EngineCore(CONFIG))


@pytest.mark.parametrize("overlap", [False, True], ids=["one-by-one", "overlap"])
@pytest.mark.parametrize(
    ("switch", "num_cached"),
    [
        ({}, 4 * 96),
        ({"prefix_caching": False}, 0),
        ({"single_flight": False}, 96),
        ({"task_groups": False}, 4 * 96),
        ({"policy": "fcfs"}, 4 * 96),
        ({"sharing": "never"}, 4 * 96),
        ({"eviction": "lru"}, 4 * 96),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_answers_are_the_same(
    switch: dict[str, Any], num_cached: int, overlap: bool, expected: dict[str, list[int]]
) -> None:
    core = EngineCore(CONFIG.model_copy(update={**switch, "overlap": overlap}))
    assert answers(core) == expected
    stats = core.stats()
    assert stats.cached_tokens == num_cached
    assert stats.computed_tokens == NUM_CALLS * 99 - num_cached
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert (stats.pages_cached == 0) == (not core._config.prefix_caching)
