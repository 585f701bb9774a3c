"""The corpus on a real server: compiled equals native in what the engine computed, outputs and joined stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from chain_corpus import CASES, Case
from test_corpus import WAYS, comparable

from conftest import TENANTS
from langchain_macaw import ChatMacaw, compile
from macaw_server.engine.types import EngineRequest
from macaw_server.serve import LocalServer


class Observed:
    """Requests as the client sent them, and prompts as the engine got them."""

    def __init__(self) -> None:
        self.paths: Counter[str] = Counter()
        self.prompts: Counter[tuple[int, ...]] = Counter()

    def clear(self) -> None:
        self.paths.clear()
        self.prompts.clear()


@pytest.fixture
def observed(local_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> Observed:
    observed = Observed()
    assert local_server.service is not None
    engine = local_server.service.models.find(None).engine
    submit = engine.submit

    def record(request: EngineRequest, on_output: Any) -> None:
        observed.prompts[tuple(request.prompt_ids)] += not request.prefill_only  # what only warms the cache is no call
        submit(request, on_output)

    monkeypatch.setattr(engine, "submit", record)
    return observed


@pytest.fixture
def real_llm(local_server: LocalServer, observed: Observed) -> Iterator[ChatMacaw]:
    def count(request: httpx.Request) -> None:
        observed.paths[request.url.path] += 1

    with httpx.Client(event_hooks={"request": [count]}, timeout=120) as http:
        yield ChatMacaw(
            model="macaw-demo",
            base_url=f"{local_server.url}/v1",
            api_key=TENANTS[0],
            temperature=0,
            max_tokens=10,
            seed=3,  # some of the chains bind a temperature
            http_client=http,
        )


@pytest.mark.parametrize("way", ["invoke", "stream"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiled_equals_native(case: Case, way: str, real_llm: ChatMacaw, observed: Observed) -> None:
    chain, run = case.build(real_llm), WAYS[way]
    expected, prompts = reusable(comparable(run(chain, case.input))), observed.prompts.copy()
    assert prompts.total() == case.num_calls
    observed.clear()
    assert reusable(comparable(run(compile(chain), case.input))) == expected
    assert observed.prompts == prompts, "the engine saw the same tokens"
    assert observed.paths == {"/v1/programs": 1}


def reusable(value: Any) -> Any:
    """`value` without ids, and without usage: the second run finds more in the cache."""
    if isinstance(value, dict):
        dropped = {"usage_metadata", "token_usage", "id"}
        return {name: reusable(v) for name, v in value.items() if name not in dropped}
    return [reusable(v) for v in value] if isinstance(value, list) else value
