"""Programs that grow, on a real server: compiled equals native in what the engine computed and in outputs."""

from __future__ import annotations

from typing import Any

import pytest
from test_client_steps import Count, ask, map_behind_retriever, retrieval
from test_dynamic import branch, map_over_answer, routed
from test_real_server import Observed, observed, real_llm, reusable

from langchain_macaw import ChatMacaw, compile

__all__ = ["observed", "real_llm"]  # fixtures

CHAINS: dict[str, Any] = {
    "between": (lambda llm, count: ask(llm) | count.step("a") | ask(llm, "Then {y}") | ask(llm, "Last {z}"), 1),
    "retrieval": (retrieval, 0),
    "map_behind_retriever": (map_behind_retriever, 0),
    "map_over_answer": (map_over_answer, 1),
    "branch": (lambda llm, count: ask(llm) | branch(llm, count, 1), 1),
    "routed": (routed, 1),
}


@pytest.mark.parametrize("name", CHAINS)
def test_compiled_equals_native(name: str, real_llm: ChatMacaw, observed: Observed) -> None:
    build, growths = CHAINS[name]
    count = Count()
    chain = build(real_llm, count)
    expected, prompts, ran = reusable(chain.invoke({"x": "1"})), observed.prompts.copy(), count.ran.copy()
    observed.clear()
    count.ran.clear()
    assert reusable(compile(chain).invoke({"x": "1"})) == expected
    assert observed.prompts == prompts, "the engine saw the same tokens"
    assert count.ran == ran
    assert observed.paths.pop("/v1/programs") == 1
    assert sum(observed.paths.values()) == growths
    assert "/v1/chat/completions" not in observed.paths
