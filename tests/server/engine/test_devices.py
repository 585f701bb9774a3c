"""GPUs shared out among engines, on machines that are made up, and what the engines' processes are started with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from macaw_server import serve
from macaw_server.config import EngineConfig, ServerConfig
from macaw_server.engine import process
from macaw_server.engine.devices import find_gpus, shares
from macaw_server.engine.process import EngineProcess
from macaw_server.engine.ranks import Seat


def given(num_gpus: int, **config: Any) -> list[tuple[str | None, int, int | None]]:
    """GPUs, engines that share them, and KV memory, of each engine."""
    found = shares(EngineConfig(**config), [str(i) for i in range(num_gpus)])
    return [(share.visible_gpus, share.config.engines, share.config.kv_memory) for share in found]


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_engines_share_what_there_is_one_of(num_gpus: int) -> None:
    assert given(num_gpus, engines=2, kv_memory=1000) == [(None, 2, 1000)] * 2


def test_each_has_a_gpu_of_its_own() -> None:
    assert given(4, engines=2, kv_memory=1000) == [("0", 1, 500), ("1", 1, 500)]
    assert given(2, engines=2, device="cuda") == [("0", 1, None), ("1", 1, None)]


def test_ranks_have_one_each() -> None:
    assert given(5, engines=2, tensor_parallel_size=2) == [("0,1", 1, None), ("2,3", 1, None)]


def test_too_few_are_shared() -> None:
    assert given(2, engines=3, kv_memory=900) == [("0", 2, 600), ("1", 1, 300), ("0", 2, 600)]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_device_by_name_is_for_all(device: str) -> None:
    assert given(4, engines=2, device=device) == [(None, 2, None)] * 2


def test_gpus_are_found_by_their_files_or_chosen(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert find_gpus({}, tmp_path) == ["0", "1", "2"]
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-5e1f"}, tmp_path) == ["3", "GPU-5e1f"]
    assert find_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []


def test_the_process_of_each_engine_sees_its_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Callable[..., None], EngineConfig]] = []

    class NoProcesses:
        members = ()

        def __init__(self, main: Callable[..., None], config: EngineConfig) -> None:
            started.append((main, config))

    monkeypatch.setattr(process, "Ranks", NoProcesses)
    monkeypatch.setattr(serve, "find_gpus", lambda: ["0", "1"])
    group = serve.make_engine(EngineProcess, ServerConfig(engines=2), [])
    for member in group._members:  # type: ignore[attr-defined]
        member._spawn()
    assert [main.keywords["visible_gpus"] for main, _ in started] == ["0", "1"]  # type: ignore[attr-defined]
    assert [config.engines for _, config in started] == [1, 1]

    class EndError(Exception):
        """The process ends here."""

    seen = []

    def thread(**_: object) -> None:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        raise EndError

    monkeypatch.setattr(process.threading, "Thread", thread)
    monkeypatch.setattr(process.signal, "signal", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    for main, config in started:
        with pytest.raises(EndError):
            main(config, None, Seat(0, ()))
    assert seen == ["0", "1"], "before anything is imported that looks for GPUs"
