"""What an engine's step costs outside of the forward pass, and what planning its attention costs.

    python tests/bench/overhead.py [--model macaw-demo] [--steps 200]

*outside* is the step's time less that of the forward pass: scheduling, planning, the step's tensors, sampling and
bookkeeping; its largest parts stand beside it. Then the planner alone, step after step after the first, and the slots
of new tokens. Medians and 90th percentiles, in ms.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch

from macaw_kernels import HeadConfig, Planner, default_profile
from macaw_server.config import EngineConfig
from macaw_server.engine import core as core_module
from macaw_server.engine.core import EngineCore
from macaw_server.engine.types import EngineRequest, SamplingParams

PAGE_SIZE = 16
HEADS = HeadConfig(14, 2, 64, 64)


class Timed:
    """A function that knows how long its last call took."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.last_s = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        start = time.perf_counter()
        try:
            return self._function(*args, **kwargs)
        finally:
            self.last_s = time.perf_counter() - start


def steps(model: str, batch: int, num_steps: int) -> str:
    """A line about decode steps of `batch` greedy requests over one prefix."""
    engine = EngineCore(EngineConfig(model=model, max_num_seqs=batch))
    runner = engine._runner
    timed = {
        "forward": Timed(runner._forward),
        "schedule": Timed(engine._scheduler.schedule),
        "run": Timed(runner.run),
        "sample": Timed(core_module.sample),
        "postprocess": Timed(engine._postprocess),
    }
    runner._forward, runner.run = timed["forward"], timed["run"]
    engine._scheduler.schedule, engine._postprocess = timed["schedule"], timed["postprocess"]
    core_module.sample = timed["sample"]
    prefix = [5 + i % 200 for i in range(20 * PAGE_SIZE)]
    sampling = SamplingParams(temperature=0, max_tokens=num_steps + 10, min_tokens=num_steps + 10)
    for i in range(batch):
        assert engine.add(EngineRequest(f"r{i}", [*prefix, 7 + i, 9], sampling)) is None
    for _ in range(4):
        engine.step()
    rows = []
    for _ in range(num_steps):
        start = time.perf_counter()
        outputs = engine.step()
        total_s = time.perf_counter() - start
        assert [len(output.token_ids) for output in outputs] == [1] * batch
        of = {name: each.last_s for name, each in timed.items()}
        rows.append(
            [total_s - of["forward"], of["schedule"], of["run"] - of["forward"], of["sample"], of["postprocess"]]
        )
    core_module.sample = timed["sample"]._function
    ms = 1000 * np.array(rows)
    return f"{batch:5}  {np.median(ms[:, 0]):8.3f} {np.percentile(ms[:, 0], 90):8.3f}  " + "  ".join(
        f"{value:11.3f}" for value in np.median(ms[:, 1:], axis=0)
    )


def planning(batch: int, *, shared: bool, num_steps: int) -> str:
    """A line about planning decode steps of `batch` sequences of 1000 tokens and more."""
    planner = Planner(HEADS, default_profile(torch.device("cpu"), torch.bfloat16), PAGE_SIZE)
    pages = count()
    prefix = [next(pages) for _ in range(62)] if shared else []
    tables = [prefix + [next(pages) for _ in range(68 - len(prefix))] for _ in range(batch)]
    contexts = np.array([PAGE_SIZE * len(table) - i % PAGE_SIZE for i, table in enumerate(tables)])
    queries = np.ones(batch, dtype=np.int64)
    rows = []
    for _ in range(num_steps + 1):
        contexts = contexts + 1
        for table, context in zip(tables, contexts.tolist(), strict=True):
            if context > PAGE_SIZE * len(table):
                table.append(next(pages))
        start = time.perf_counter()
        plan = planner.plan(tables, contexts, queries)
        middle = time.perf_counter()
        plan.slot_mapping()
        rows.append([middle - start, time.perf_counter() - middle])
    assert len(plan.shared) == int(shared)
    ms = 1000 * np.array(rows[1:])
    return (
        f"{batch:5}  {'yes' if shared else 'no':6} {np.median(ms[:, 0]):8.3f} {np.percentile(ms[:, 0], 90):8.3f}  "
        + (f"{np.median(ms[:, 1]):8.3f}")
    )


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="macaw-demo")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    print("batch   outside      p90     schedule          run       sample  postprocess")
    for batch in (1, 8, 32):
        print(steps(args.model, batch, args.steps), flush=True)
    print("\nbatch  shared     plan      p90     slots")
    for batch in (1, 32, 64):
        for shared in (False, True):
            print(planning(batch, shared=shared and batch > 1, num_steps=args.steps), flush=True)


if __name__ == "__main__":
    main()
