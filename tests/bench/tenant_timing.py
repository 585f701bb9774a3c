"""Can a tenant tell from the time to its first token what another one has sent? It must not.

    python tests/bench/tenant_timing.py [--rounds 60]

In each round tenant B sends two prompts that it has never sent: one that tenant A sent just before (*known to A*), and
one that nobody sent (*new*), in random order. Then it sends one again that is its own (*own*), which shows what a hit
would look like, and that the measurement would find one. Printed are medians, and the probability of a difference of
means at least as large as that between the first two if labels meant nothing (a permutation test): small means that the
tenants can be told apart. Before anything is timed, the counts of cached tokens are checked.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import httpx

from macaw_server.serve import LocalServer

WORDS = 700


def prompt(rng: random.Random) -> str:
    """Text that was never sent."""
    return " ".join(f"{rng.randrange(10**6)}" for _ in range(WORDS // 4))


def send(client: httpx.Client, text: str) -> tuple[float, int]:
    """Milliseconds to the one token of the answer, and cached tokens."""
    begin = time.perf_counter()
    body = {"prompt": text, "max_tokens": 1, "temperature": 0}
    usage = client.post("/v1/completions", json=body).raise_for_status().json()["usage"]
    return (time.perf_counter() - begin) * 1000, usage["prompt_tokens_details"]["cached_tokens"]


def p_value(first: list[float], second: list[float], rng: random.Random, num: int = 10_000) -> float:
    """Share of random relabelings whose difference of means is as large."""
    both, seen = first + second, abs(statistics.fmean(first) - statistics.fmean(second))
    hits = 0
    for _ in range(num):
        rng.shuffle(both)
        hits += abs(statistics.fmean(both[: len(first)]) - statistics.fmean(both[len(first) :])) >= seen
    return hits / num


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    times: dict[str, list[float]] = {"known to A": [], "new": [], "own": []}
    with LocalServer(model="macaw-demo", dtype="float32", max_model_len=4096, api_key=("a", "b")) as server:
        a, b = (
            httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=60) for key in "ab"
        )
        with a, b:
            for i in range(args.rounds + 3):
                texts = {"known to A": prompt(rng), "new": prompt(rng)}
                send(a, texts["known to A"])
                order = [*rng.sample(sorted(texts), 2), "own"]
                texts["own"] = texts[order[0]]
                for name in order:
                    time_ms, cached = send(b, texts[name])
                    if (cached > 0) != (name == "own"):
                        raise SystemExit(f"round {i}, {name}: {cached} cached tokens.")
                    if i >= 3:
                        times[name].append(time_ms)
    for name, values in times.items():
        print(f"{name:12} {statistics.median(values):8.2f} ms  (mean {statistics.fmean(values):.2f})")
    print(f"known to A against new: p = {p_value(times['known to A'], times['new'], rng):.3f}")
    print(f"own against new:        p = {p_value(times['own'], times['new'], rng):.3f}")


if __name__ == "__main__":
    main()
