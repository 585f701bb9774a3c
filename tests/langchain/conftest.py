"""The server that the LangChain tests talk to.

The corpus needs two things of a server: `server_url`, and a `recorder` of the prompts and requests that it
saw. Another pair of fixtures points the corpus at another server.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

# Not through tests/, where this folder would be importable as `langchain`, the name of a real package.
sys.path.append(str(Path(__file__).parent))

from langchain_core._api.beta_decorator import LangChainBetaWarning

from langchain_macaw import ChatMacaw
from langchain_macaw.lowering import warn_once
from macaw_server.serve import LocalServer
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


@pytest.fixture(scope="session")
def capable_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server of the model under two names."""
    from capable_model import MODEL, OTHER_MODEL, save_capable_model

    folder = tmp_path_factory.mktemp(MODEL) / MODEL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LangChainBetaWarning)  # of as_tool, which a standard test uses
        save_capable_model(folder)
    with LocalServer(model=str(folder), served_model_name=MODEL, dtype="float32", max_model_len=2048) as server:
        assert server.service is not None
        served = server.service.models.find(MODEL)
        server.service.models._models[OTHER_MODEL] = dataclasses.replace(served, name=OTHER_MODEL)
        yield server
