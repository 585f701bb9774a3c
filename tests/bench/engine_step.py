"""What CUDA graphs and overlap bring to a decode step: the engine in this process, without HTTP.

    python tests/bench/engine_step.py [--device cuda] [--shape 8b] [--batch 1 8 32 64] [--steps 64]

Random weights of a real shape; each sequence has a prompt of its own behind a shared prefix. Every set of switches gets
an engine of its own, one after the other; on a CPU graphs are left out. The answers are compared with those of plain
steps: in float32 they must be the same, or there is no number. In half precision batches of other sizes round
differently, and `same` says how many of the tokens agree.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.types import EngineRequest, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    | {"num_key_value_heads": 2, "vocab_size": 8192},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
}
SLACK = 16
"""Tokens of an answer before and after those that are timed."""
SWITCHES = {
    "plain": {"cuda_graphs": False, "overlap": False},
    "overlap": {"cuda_graphs": False, "overlap": True},
    "graphs": {"cuda_graphs": True, "overlap": False},
    "graphs, overlap": {"cuda_graphs": True, "overlap": True},
}


class Measured(NamedTuple):
    """A decode step: its time, the host's part outside of launching and waiting, and the tokens of all rounds."""

    step_ms: float
    host_ms: float
    tokens: list[list[int]]


def requests(batch: int, args: argparse.Namespace, vocab_size: int) -> list[EngineRequest]:
    """The same for every engine."""
    rng = random.Random(batch)
    prefix = [rng.randrange(10, vocab_size) for _ in range(args.prefix)]
    params = SamplingParams(max_tokens=args.steps + SLACK, temperature=0)
    return [
        EngineRequest(f"{i}", prefix + [rng.randrange(10, vocab_size) for _ in range(args.own)], params)
        for i in range(batch)
    ]


def measure(core: EngineCore, batch: int, args: argparse.Namespace) -> Measured:
    """Time `args.steps` decode steps of a full batch, `args.rounds` times; the first round is not counted."""
    step_ms, host_ms, tokens = [], [], []
    for _ in range(args.rounds + 1):
        answers: dict[str, list[int]] = {}
        for request in requests(batch, args, core.info.vocab_size):
            answers[request.request_id] = []
            assert core.add(request) is None

        def step(answers: dict[str, list[int]]) -> None:
            for output in core.step():
                assert output.error is None, output.error
                answers[output.request_id] += output.token_ids

        while min(map(len, answers.values())) < 4:
            step(answers)
        before, begin = core.stats(), time.perf_counter()
        for _ in range(args.steps):
            step(answers)
        took, after = time.perf_counter() - begin, core.stats()
        while core.has_work:
            step(answers)
        assert after.running == batch, f"{after.running} of {batch} sequences decode at the end of the measurement"
        step_ms.append(took / args.steps * 1e3)
        host_ms.append((after.overhead_s - before.overhead_s) / args.steps * 1e3)
        tokens += answers.values()
    return Measured(statistics.median(step_ms[1:]), statistics.median(host_ms[1:]), tokens)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="8b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--own", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}, shape {args.shape}, {args.dtype}, {args.prefix} + {args.own} tokens\n")
    print("| switches | batch | ms per step | host ms | tokens/s | same |\n|---|---|---|---|---|---|")
    plain: dict[int, Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192}
        (Path(folder) / "config.json").write_text(json.dumps(config | SHAPES[args.shape] | {"eos_token_id": 2}))
        for label, switches in SWITCHES.items():
            if switches["cuda_graphs"] and args.device == "cpu":
                continue
            core = EngineCore(
                EngineConfig(
                    model=folder,
                    load_format="dummy",
                    device=args.device,
                    dtype=args.dtype,
                    max_num_seqs=max(args.batch),
                    max_model_len=args.prefix + args.own + args.steps + SLACK,
                    max_num_batched_tokens=args.prefix + max(args.batch) * args.own,
                    **switches,
                )
            )
            for batch in args.batch:
                seen = measure(core, batch, args)
                right = plain.setdefault(batch, seen).tokens
                pairs = [(a, b) for x, y in zip(seen.tokens, right, strict=True) for a, b in zip(x, y, strict=True)]
                same = sum(a == b for a, b in pairs) / len(pairs)
                if args.dtype == "float32" and same < 1:
                    raise SystemExit(f"{label}, batch {batch}: {same:.1%} of the tokens are those of plain steps")
                print(
                    f"| {label} | {batch} | {seen.step_ms:.3f} | {seen.host_ms:.3f} "
                    f"| {batch / seen.step_ms * 1e3:,.0f} | {same:.1%} |",
                    flush=True,
                )
            del core
            gc.collect()
            if args.device != "cpu":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
