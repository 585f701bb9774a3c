"""What rows cost: the time of a step with one decode, and a chunk of another prompt beside it.

    python tests/bench/step_rows.py [--model macaw-demo] [--rows 0 4 8 16 32 64 256]

Where some rows cost next to nothing, `--ahead-rows` may be as many; where each costs what it costs in the longest
chunk, none.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.types import EngineRequest, SamplingParams

MAX_STEPS, MAX_PROMPT = 24, 1400


def step_ms(core: EngineCore, num_rows: int) -> float:
    """The median step with `num_rows` rows of prefill."""
    core._scheduler = scheduler = core._new_scheduler()
    core.add(EngineRequest("decode", [i % 500 + 4 for i in range(512)], SamplingParams(max_tokens=1000, temperature=0)))
    core.step()
    scheduler.config = replace(scheduler.config, max_prefill_chunk=max(1, num_rows), max_num_batched_tokens=2048)
    num_steps = min(MAX_STEPS, MAX_PROMPT // max(1, num_rows) - 2)
    if num_rows:
        prompt = [7 * i % 500 + 4 for i in range(num_rows * (num_steps + 3))]
        core.add(EngineRequest("prefill", prompt, SamplingParams(max_tokens=1)))
    core.step()
    times = []
    for _ in range(num_steps):
        begin = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="macaw-demo")
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 4, 8, 16, 32, 64, 256])
    args = parser.parse_args()
    core = EngineCore(EngineConfig(model=args.model, max_model_len=2048, kv_memory=256 * 2**20))
    alone = step_ms(core, 0)
    print(f"{args.model}, {core.info.dtype} by {core.info.backend}\nrows  step ms  ms per row")
    for num_rows in args.rows:
        ms = step_ms(core, num_rows)
        print(f"{num_rows:4} {ms:8.2f} {(ms - alone) / num_rows if num_rows else 0:8.3f}", flush=True)


if __name__ == "__main__":
    main()
