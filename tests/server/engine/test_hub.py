"""Hub names without a network: said in words, unless the model is cached."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.errors import ModelLoadError
from macaw_server.models import hub, loader
from tiny_models import save_model

NOBODY = "http://127.0.0.1:1"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub where nobody listens."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.unreachable.cache_clear()
    return tmp_path


@pytest.fixture
def cached(cache: Path) -> Path:
    """A snapshot of org/tiny as the hub library keeps it."""
    repository = cache / file_download.repo_folder_name(repo_id="org/tiny", repo_type="model")
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    save_model(repository / "snapshots" / COMMIT, "llama")
    return repository / "snapshots" / COMMIT


@pytest.fixture
def answering() -> Iterator[str]:
    """A server that knows nothing, but answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_hub_that_cannot_be_reached_is_said(cache: Path) -> None:
    with pytest.raises(
        ModelLoadError, match=rf"hub at {NOBODY} cannot be reached .*org/tiny is not in its cache, {cache}"
    ):
        loader.resolve(EngineConfig(model="org/tiny"))
    with pytest.raises(ModelLoadError, match=r"org/tiny \(revision v2\) is not in its cache"):
        loader.resolve(EngineConfig(model="org/tiny", revision="v2"))


def test_a_cached_model_needs_no_hub(cached: Path) -> None:
    config = EngineConfig(model="org/tiny", dtype="float32")
    assert loader.resolve(config) == str(cached)
    assert EngineCore(config).info.weight_bytes > 0
    assert loader.load_tokenizer(config)("hello")["input_ids"]


def test_a_cached_model_with_parts_missing_is_refused(cached: Path) -> None:
    (cached / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="has no weights"):
        loader.resolve(EngineConfig(model="org/tiny"))


def test_offline_mode_asks_nobody(cached: Path, answering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", answering)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.snapshot("org/tiny", None) == cached
    with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE is set"):
        hub.snapshot("org/other", None)
    assert hub.unreachable.cache_info().currsize == 0


def test_a_hub_that_answers_is_the_hub_librarys_to_ask(
    cached: Path, answering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", answering)
    assert loader.resolve(EngineConfig(model="org/tiny")) == "org/tiny", "there may be a newer one"


def test_a_connection_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    monkeypatch.setattr(hub.httpx, "head", lambda *_, **__: forever.wait())
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.05)
    assert hub.unreachable(NOBODY) == "no connection within 0.05 s"
    forever.set()
