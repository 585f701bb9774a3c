"""Where the time of an engine's step goes on the CPU: by phase of the native decoder, against what the machine can do.

    python tests/bench/step.py FOLDER [--dtype bfloat16] [--quantization int8] [--rounds 20] [--cases NAME,NAME]

Each case is a batch as the engine makes it, run again and again; medians of the rounds, in ms. *GFLOP/s* and *GB/s* are
of the matrix products: their arithmetic, and the weights once, over the time of their phases. *attend* beside them
is what attention reaches: GB/s of the keys and values that must be read, or GFLOP/s with a chunk of a prefill.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from macaw_kernels import DeviceProfile, HeadConfig, default_profile
from macaw_kernels.cpu.decoder import PHASES, NativeDecoder
from macaw_server.bench.limits import measure_machine, model_cost
from macaw_server.config import EngineConfig
from macaw_server.engine.forward import NativeForward
from macaw_server.engine.runner import Chunk, ModelRunner
from macaw_server.models import loader
from macaw_server.models.probe import prepare

PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Case:
    """A step.

    Attributes:
        prefix: Tokens that all decoding sequences share.
        batch: Sequences that decode.
        own: Tokens of each behind the prefix, this step's included.
        chunk: Tokens of a prefill beside them, behind the prefix.
        chunks: How many such.
    """

    name: str
    prefix: int
    batch: int
    own: int
    chunk: int = 0
    chunks: int = 0

    def make(self) -> list[Chunk]:
        """The step's chunks, with pages of their own behind the prefix's."""
        pages = iter(range(10**9))
        shared = [next(pages) for _ in range(self.prefix // PAGE_SIZE)]
        start = len(shared) * PAGE_SIZE
        lens = [(start + self.own - 1, 1)] * self.batch + [(start, self.chunk)] * self.chunks
        return [
            Chunk(
                [(7 * i + j) % 1000 for j in range(count)],
                first,
                shared + [next(pages) for _ in range(-(-(first + count - start) // PAGE_SIZE))],
                1,
            )
            for i, (first, count) in enumerate(lens)
        ]


CASES = (
    Case("single", 1000, 1, 96),
    Case("unshared-8", 0, 8, 1096),
    Case("shared-32", 1000, 32, 96),
    Case("prefill-512", 0, 0, 0, 512, 1),
    Case("prefill-512+8", 0, 8, 1096, 512, 1),
    Case("prefill-32x64", 1000, 0, 0, 64, 32),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cases", default="")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    rates, cost = measure_machine(dtype, torch.device("cpu")), model_cost(args.model, dtype)
    assert cost is not None
    config = EngineConfig(model=args.model, dtype=args.dtype, quantization=args.quantization)
    hf = loader.load_config(config)
    device = torch.device("cpu")
    model = loader.load_model(config, hf, device, dtype, lambda _: None)

    def profile(heads: HeadConfig) -> DeviceProfile:
        return default_profile(device, dtype, heads=heads)

    prepared = prepare(model, config, profile, lambda: loader.max_model_len(config, hf))
    assert isinstance(prepared.forward, NativeForward)
    decoder: NativeDecoder = prepared.forward.decoder
    decoder.phase_s = phase_s = np.zeros(len(PHASES))
    runner = ModelRunner(
        prepared.forward,
        prepared.layers,
        num_pages=4096,
        page_size=PAGE_SIZE,
        dtype=dtype,
        device=device,
        profile=profile,
    )
    print(f"{rates.bytes_per_s / 1e9:.1f} GB/s, {rates.flops_per_s / 1e9:.0f} GFLOP/s; {args.threads} threads")
    names = "  ".join(f"{name:>7}" for name in PHASES)
    print(f"case            ms/step  least  {names}  GFLOP/s   GB/s  attend")
    for case in CASES:
        if args.cases and case.name not in args.cases.split(","):
            continue
        chunks = case.make()
        times, phases = [], []
        for _ in range(args.rounds + 2):
            phase_s[:] = 0
            start = time.perf_counter()
            runner.run(chunks)
            times.append(time.perf_counter() - start)
            phases.append(phase_s.copy())
        times, phases = times[2:], phases[2:]
        mid = dict(zip(PHASES, np.median(phases, axis=0), strict=True))
        matrix_s = sum(mid[name] for name in ("qkv", "output", "inner", "down", "logits"))
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        flops = num_tokens * cost.body_flops + len(chunks) * cost.head_flops
        if case.chunks:
            pairs = sum(len(c.token_ids) * (c.start + (len(c.token_ids) + 1) / 2) for c in chunks)
            attend = f"{pairs * cost.attention_flops / mid['attend'] / 1e9:.0f} GFLOP/s"
        else:
            attend = f"{(case.prefix + case.batch * case.own) * cost.kv_bytes / mid['attend'] / 1e9:.1f} GB/s"
        print(
            f"{case.name:14} {1e3 * statistics.median(times):8.2f} {1e3 * min(times):6.2f}  "
            f"{'  '.join(f'{1e3 * s:7.2f}' for s in mid.values())} "
            f"{flops / matrix_s / 1e9:8.0f} {cost.weight_bytes / matrix_s / 1e9:6.1f}  {attend}",
            flush=True,
        )


if __name__ == "__main__":
    main()
