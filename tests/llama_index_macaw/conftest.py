"""The server that the LlamaIndex tests talk to. What needs a real one is left out where there is no torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from llama_index.llms.macaw import Macaw
from scripted_macaw_server import Recorder, serving

collect_ignore_glob = [] if find_spec("torch") else ["test_real_*.py"]


@pytest.fixture(scope="session")
def _server() -> Iterator[tuple[str, Recorder]]:
    recorder = Recorder()
    with serving(recorder) as url:
        yield url, recorder


@pytest.fixture
def server_url(_server: tuple[str, Recorder]) -> str:
    return _server[0]


@pytest.fixture
def recorder(_server: tuple[str, Recorder]) -> Recorder:
    _server[1].clear()
    return _server[1]


@pytest.fixture
def llm(server_url: str, recorder: Recorder) -> Macaw:
    return Macaw(model="m", api_base=server_url, temperature=0, max_retries=0)
