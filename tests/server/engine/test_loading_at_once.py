"""Models that load in threads of one process, all of which has one default dtype of torch and one random state."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from collector import running
from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.thread import EngineThread
from macaw_server.engine.types import EngineRequest, SamplingParams
from macaw_server.models import loader
from tiny_models import prompts, save_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture
def default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def weights(config: EngineConfig) -> dict[str, Tensor]:
    hf = loader.load_config(config)
    model = loader.load_model(config, hf, torch.device("cpu"), DTYPES[config.dtype], lambda _: None)
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.usefixtures("default_dtype")
def test_weights_are_those_of_a_model_that_loads_alone(load_format: Any, tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    configs = [EngineConfig(model=str(tmp_path), load_format=load_format, dtype=dtype) for dtype in (*DTYPES, *DTYPES)]
    alone = [weights(config) for config in configs]
    for _ in range(5):
        with ThreadPoolExecutor(len(configs)) as pool:
            at_once = list(pool.map(weights, configs))
        assert [same(a, b) for a, b in zip(alone, at_once, strict=True)] == [True] * len(configs)
        assert torch.get_default_dtype() == torch.float32


async def test_engines_that_start_at_once_answer_as_one_alone(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    config = EngineConfig(model=str(tmp_path), load_format="dummy", dtype="float32", max_model_len=96)

    async def answer() -> list[int]:
        async with running(EngineThread(config)) as collector:
            collector.submit(EngineRequest("r", prompts()[0], SamplingParams(max_tokens=16, temperature=0)))
            await collector.end("r")
            return collector.tokens("r")

    alone = await answer()
    assert await asyncio.gather(answer(), answer(), answer()) == [alone] * 3


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.usefixtures("default_dtype")
def test_steps_do_not_depend_on_the_default_dtype(native: bool, tmp_path: Path) -> None:
    """It is another one for as long as another thread constructs a model in bfloat16."""
    save_model(tmp_path, "llama")
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=1, top_p=0.9, frequency_penalty=0.5, logprobs=2)

    def answers(dtype: torch.dtype) -> list[Any]:
        core = EngineCore(EngineConfig(model=str(tmp_path), dtype="float32", max_model_len=96, native=native))
        torch.set_default_dtype(dtype)
        for i, prompt in enumerate(prompts()):
            assert core.add(EngineRequest(str(i), prompt, params)) is None
        outputs = []
        while core.has_work:
            outputs += [(o.request_id, o.token_ids, o.logprobs, o.error) for o in core.step()]
        torch.set_default_dtype(torch.float32)
        return outputs

    assert answers(torch.bfloat16) == answers(torch.float32)
