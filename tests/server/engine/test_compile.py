"""`torch.compile` of the modules: an opt-in that has to answer as before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AttentionInterface

from macaw_server.config import EngineConfig
from macaw_server.engine.attention import ATTENTION_NAME, paged_attention
from macaw_server.engine.core import EngineCore
from macaw_server.engine.types import EngineRequest
from macaw_server.errors import ConfigError
from server.engine.test_exactness import prompts, run, variety
from tiny_models import save_model


@pytest.fixture(autouse=True)
def _attention() -> Iterator[None]:
    """Others shall not have it wrapped."""
    yield
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    torch.compiler.reset()


def compile_by(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less to wait for than Inductor."""
    inner = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: inner(self, backend=backend, **options))


def config(folder: Path, **options: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", dtype="float32", max_model_len=96, native=False, **options)


@pytest.mark.slow
def test_compiled_modules_answer_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "llama", num_hidden_layers=2)
    requests = [
        EngineRequest(f"r{i}", p, params) for i, (p, params) in enumerate(zip(prompts(), variety(), strict=True))
    ]
    expected = run(EngineCore(config(tmp_path)), requests, late=2)
    compile_by("eager", monkeypatch)
    counters.clear()
    core = EngineCore(config(tmp_path, torch_compile=True))
    assert 0 < counters["stats"]["unique_graphs"] < 20, "layers share what was compiled"
    answers = run(core, requests, late=2)
    assert {name: tokens for name, (tokens, _) in answers.items()} == {n: tokens for n, (tokens, _) in expected.items()}


@pytest.mark.slow
def test_compiled_modules_that_answer_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "llama", num_hidden_layers=1)

    def wrong(graph: Any, _inputs: Any) -> Any:
        return lambda *args: [x * 1.5 if isinstance(x, Tensor) and x.is_floating_point() else x for x in graph(*args)]

    compile_by(wrong, monkeypatch)
    with pytest.raises(ConfigError, match=r"answers otherwise: logits are off by .* \(accepted: 0.001\)"):
        EngineCore(config(tmp_path, torch_compile=True))


@pytest.mark.slow
def test_modules_that_cannot_be_compiled_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "llama", num_hidden_layers=1)

    def broken(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("no compiler found")

    compile_by(broken, monkeypatch)
    with pytest.raises(ConfigError, match=r"(?s)cannot be compiled.*no compiler found"):
        EngineCore(config(tmp_path, torch_compile=True))


def test_the_native_decoder_has_no_modules_to_compile() -> None:
    with pytest.raises(ConfigError, match="or with --no-native"):
        EngineCore(EngineConfig(device="cpu", dtype="float32", max_model_len=96, torch_compile=True))
