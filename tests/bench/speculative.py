"""Speculative decoding on and off, in alternation, on one engine each: tokens per second and their ratio.

    python tests/bench/speculative.py [--model macaw-demo] [--rounds 5] [--drafts 8]

A model of random weights copies nothing by itself. *loop* is greedy decoding with one token biased to win: every draft
holds, which is the most that speculation can bring. *repeats* is greedy under a repetition "penalty" below 1: the model
prefers tokens it has seen, which drafts foresee now and then. *random* is sampling at temperature 1, of which
nothing can be foreseen: the cost of looking. Real models lie between these; how often drafts hold is the text's matter.
The answers of both engines are compared before anything is timed. Time is the process's CPU time, which other programs
on the machine disturb less than the wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import time

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.types import EngineRequest, SamplingParams

CASES = {
    "loop": SamplingParams(max_tokens=96, temperature=0, logit_bias={7: 1e4}),
    "repeats": SamplingParams(max_tokens=96, temperature=0, repetition_penalty=0.7),
    "random": SamplingParams(max_tokens=96, temperature=1.0),
}


def answers(core: EngineCore, params: SamplingParams, batch: int) -> dict[str, list[int]]:
    """Run a batch to its end."""
    for i in range(batch):
        core.add(EngineRequest(f"r{i}", [(7 * j + 31 * i) % 500 + 4 for j in range(64)], params))
    tokens: dict[str, list[int]] = {}
    while core.has_work:
        for output in core.step():
            if output.error is not None:
                raise SystemExit(f"{output.request_id}: {output.error[1]}")
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


def timed(core: EngineCore, params: SamplingParams, batch: int) -> float:
    """Tokens per second of CPU time of one batch."""
    begin = time.process_time()
    count = sum(map(len, answers(core, params, batch).values()))
    return count / (time.process_time() - begin)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="macaw-demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drafts", type=int, default=8)
    parser.add_argument("--ridge", type=float, help="default: as measured")
    args = parser.parse_args()
    common = {
        "model": args.model,
        "dtype": "float32",
        "load_format": "auto" if args.model == "macaw-demo" else "dummy",
        "max_model_len": 256,
    }
    off = EngineCore(EngineConfig(**common, speculative_tokens=0))
    on = EngineCore(EngineConfig(**common, speculative_tokens=args.drafts, speculative_ridge=args.ridge))
    print(f"{args.model}, at most {args.drafts} drafts, ridge {on.ridge:.1f}")
    print("output   batch  off tok/s   on tok/s  ratio (min - max)      accepted of drafts")
    for name, params in CASES.items():
        for batch in (1, 8):
            if answers(off, params, batch) != answers(on, params, batch):
                raise SystemExit(f"{name}, batch {batch}: the answers differ.")
            before = on.stats()
            pairs = [(timed(off, params, batch), timed(on, params, batch)) for _ in range(args.rounds)]
            ratios = [fast / slow for slow, fast in pairs]
            plain, spec = (statistics.median(side) for side in zip(*pairs, strict=True))
            stats = on.stats()
            print(
                f"{name:8} {batch:5} {plain:10.0f} {spec:10.0f} {statistics.median(ratios):6.2f} "
                f"({min(ratios):.2f} - {max(ratios):.2f}) "
                f"{stats.accepted_tokens - before.accepted_tokens:10} of {stats.draft_tokens - before.draft_tokens}"
            )


if __name__ == "__main__":
    main()
