"""Measures how long the steps of a real engine take, on requests of all sizes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.simulate.model_file import LIMITS, ModelFile
from macaw_server.simulate.real import RealRun, config_of, warm_up
from macaw_server.workloads import CallSpec, ProgramSpec, Text


def fit(
    core: EngineCore,
    engine: EngineConfig,
    *,
    seconds: float,
    max_prompt_len: int = 2048,
    on_progress: Callable[[str], object] = lambda _: None,
) -> ModelFile:
    """Run rounds of requests until the time is over; two rounds at least.

    A round has a burst of 1, 2, 4, ... requests up to the engine's limit, with lengths spread over all orders of
    magnitude; half of them share a prefix.

    Args:
        core: A loaded engine with nothing to do.
        engine: Its configuration.
        seconds: To measure for.
        max_prompt_len: Longest prompt.
        on_progress: Told what goes on.
    """
    warm_up(core)
    draw, begin, num_rounds = random.Random(0), time.perf_counter(), 0
    longest = min(max_prompt_len, core.info.max_model_len // 2, core.info.num_pages * core.info.page_size // 4)
    while num_rounds < 2 or time.perf_counter() - begin < seconds:
        size = 1
        while size <= min(engine.max_num_seqs, 64):
            on_progress(f"round {num_rounds + 1}: {size} requests")
            RealRun(core, [_program(draw, f"fit{num_rounds}/{size}", i, longest) for i in range(size)]).run()
            size *= 2
        num_rounds += 1
    facts = {"model": engine.model, "device": core.info.device, "dtype": core.info.dtype, "rounds": str(num_rounds)}
    limits = asdict(config_of(core, engine))
    return ModelFile(core.step_time, {name: limits[name] for name in LIMITS}, facts)


def _program(draw: random.Random, burst: str, i: int, longest: int) -> ProgramSpec:
    own = Text(f"{burst}/{i}", round(8 * (longest / 16) ** draw.random()))
    prefix = (Text(burst, longest // 2),) if i % 2 else ()
    call = CallSpec("call", (*prefix, own), draw.randint(4, 24))
    return ProgramSpec(f"{burst}/{i}", "fit", 0.0, (call,), ("call",), tenant="fit")
