"""Two-phase attention against the same attention without sharing, per layer, on this machine.

    python tests/bench/attention.py [--heads 14:2x64] [--suffix 128] [--backend native] [--dtype bfloat16]

Each case checks its answer against the reference first. `always` shares whatever it costs, `model` is what
the backend's cost model decides: ratios are the unshared time over theirs, and `model` must never be below 1
beyond noise. GB/s is what the unshared attention reads of keys and values.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass

import torch

from macaw_kernels import (
    ALWAYS_SHARE,
    BACKENDS,
    NEVER_SHARE,
    AttentionPlan,
    HeadConfig,
    attend,
    plan,
    reference_attend,
)

PAGE_SIZE = 16
CACHE_BYTES = 256 << 20
"""So many bytes of layers are walked, as in a model: no layer is still in the processor's cache."""


@dataclass(slots=True)
class Case:
    """One decode step of `batch` sequences with `prefix` shared and `suffix` own tokens each."""

    heads: HeadConfig
    prefix: int
    suffix: int
    batch: int
    backend: str
    dtype: torch.dtype

    def run(self, rounds: int) -> str:
        """Check, time and describe the case."""
        own_pages = -(-self.suffix // PAGE_SIZE)
        shared_pages = self.prefix // PAGE_SIZE
        num_pages = shared_pages + self.batch * own_pages
        page_ids = random.Random(0).sample(range(num_pages), num_pages)
        prefix, rest = page_ids[:shared_pages], page_ids[shared_pages:]
        tables = [prefix + rest[i * own_pages : (i + 1) * own_pages] for i in range(self.batch)]
        contexts, queries = [self.prefix + self.suffix] * self.batch, [1] * self.batch
        model_profile = BACKENDS[self.backend].profile(torch.device("cpu"))
        plans = {
            profile.name: plan(tables, contexts, queries, self.heads, profile, PAGE_SIZE)
            for profile in (NEVER_SHARE, ALWAYS_SHARE, model_profile)
        }

        page_bytes = self.dtype.itemsize * PAGE_SIZE * self.heads.kv_elements
        num_layers = min(16, max(1, CACHE_BYTES // (num_pages * page_bytes)))
        shape = (num_layers, num_pages, PAGE_SIZE, self.heads.num_kv_heads)
        k_pages = torch.randn(*shape, self.heads.head_dim).to(self.dtype)
        v_pages = torch.randn(*shape, self.heads.v_head_dim).to(self.dtype)
        q = torch.randn(self.batch, self.heads.num_q_heads, self.heads.head_dim).to(self.dtype)
        scale = self.heads.head_dim**-0.5
        expected = reference_attend(q, k_pages[0], v_pages[0], tables, contexts, queries, scale=scale)
        for each in plans.values():
            got = attend(q, k_pages[0], v_pages[0], each, scale=scale, backend=self.backend)
            torch.testing.assert_close(got, expected.to(self.dtype))

        def step_ms(step_plan: AttentionPlan) -> float:
            start = time.perf_counter()
            for k_layer, v_layer in zip(k_pages, v_pages, strict=True):
                attend(q, k_layer, v_layer, step_plan, scale=scale, backend=self.backend)
            return 1000 * (time.perf_counter() - start) / num_layers

        times: dict[str, list[float]] = {name: [] for name in plans}
        for _ in range(rounds):  # alternated: what else the machine does hits all alike
            for name, each in plans.items():
                times[name].append(step_ms(each))
        unshared, always, model = (statistics.median(times[name]) for name in plans)
        shared = "shared" if plans[model_profile.name].shared else "-"
        kv_bytes = self.dtype.itemsize * self.heads.kv_elements * sum(contexts)
        return (
            f"{self.prefix:6} {self.batch:6} {unshared:9.3f} {kv_bytes / unshared / 1e6:6.1f} "
            f"{unshared / always:8.2f} {unshared / model:8.2f} {shared:>8}"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="14:2x64", help="query heads : KV heads x head dim")
    parser.add_argument("--suffix", type=int, default=128, help="own tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backend", choices=BACKENDS, default="native")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prefix", type=int, nargs="+", default=[0, 64, 128, 256, 512, 2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 32])
    args = parser.parse_args()
    num_q_heads, _, rest = args.heads.partition(":")
    num_kv_heads, _, head_dim = rest.partition("x")
    heads = HeadConfig(int(num_q_heads), int(num_kv_heads), int(head_dim), int(head_dim))
    threads = torch.get_num_threads()
    print(f"{heads}, suffix {args.suffix}, {args.backend}, {args.dtype}, {threads} threads, per layer")
    print("prefix  batch  unshared   GB/s   always    model   (ms; ratios: times faster)")
    for prefix in args.prefix:
        for batch in args.batch:
            case = Case(heads, prefix, args.suffix, batch, args.backend, getattr(torch, args.dtype))
            print(case.run(args.rounds), flush=True)


if __name__ == "__main__":
    main()
