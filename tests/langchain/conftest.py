"""The server that the LangChain tests talk to.

The corpus needs two things of a server: `server_url`, and a `recorder` of the prompts and requests that it
saw. Another pair of fixtures points the corpus at another server.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Not through tests/, where this folder would be importable as `langchain`, the name of a real package.
sys.path.append(str(Path(__file__).parent))

from langchain_macaw import ChatMacaw
from langchain_macaw.lowering import warn_once
from scripted_macaw_server import Recorder, serving


@pytest.fixture(autouse=True)
def _no_warning_was_given() -> None:
    """Each is given once per process, and which test comes first is a matter of chance."""
    warn_once.cache_clear()


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
def llm(server_url: str) -> ChatMacaw:
    return ChatMacaw(model="m", base_url=server_url, temperature=0)
