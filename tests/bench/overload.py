"""One and ten times the load that a server can do: latency of what is accepted, refusals, and memory.

    python tests/bench/overload.py [--model FOLDER] [--seconds 20] [--max-live-calls 64]

A server process and two tenants. First a closed loop with as many calls as one tenant may have measures the
sustainable rate. Then open loops send calls at 0.8, 2 and 10 times that rate for a while, most of them by *greedy*;
*modest* sends a tenth of the sustainable rate each time. Printed are, per tenant: calls sent, accepted and refused
(429); latency of the accepted ones (median and 95th percentile); the `Retry-After` that the refused were told, and when
really the next call of that tenant was accepted (medians); the memory of all of the server's processes; and the cores
that each process took while the load was sent, for on a small machine the client takes from the engine. Flat means that
10x differs from 2x in the number of refusals only.

The client has to keep up with ten times the rate, so calls should be large enough for the model; the factor in the
table is that at which they really were sent.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import random
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil

TENANTS = '[greedy]\nkeys = ["greedy"]\n[modest]\nkeys = ["modest"]\n'
HEADER = (
    "load  tenant    sent accepted refused   p50 s   p95 s  told s  really s  memory MiB  cores of client, HTTP, engine"
)


class Load:
    """Sends calls, and takes down what became of them."""

    def __init__(self, client: httpx.AsyncClient, words: int, tokens: int) -> None:
        self._client = client
        self._words, self._tokens = words, tokens
        self._sent = 0
        self.latencies: dict[str, list[float]] = defaultdict(list)
        self.accepted_s: dict[str, list[float]] = defaultdict(list)
        self.refused: dict[str, list[tuple[float, float]]] = defaultdict(list)  # when, and what Retry-After said

    async def call(self, tenant: str) -> None:
        """One call with a prompt of its own."""
        self._sent += 1
        prompt = f"{self._sent} " * self._words
        body = {"prompt": prompt, "max_tokens": self._tokens, "ignore_eos": True, "temperature": 0}
        begin = time.perf_counter()
        response = await self._client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {tenant}"})
        if response.status_code == 429:
            self.refused[tenant].append((begin, float(response.headers["retry-after"])))
            return
        usage = response.raise_for_status().json()["usage"]
        if usage["completion_tokens"] != self._tokens:
            raise SystemExit(f"{usage['completion_tokens']} tokens, {self._tokens} were asked for.")
        self.latencies[tenant].append(time.perf_counter() - begin)
        self.accepted_s[tenant].append(begin)

    def waits(self, tenant: str) -> list[float]:
        """From each refusal to when the next call of the tenant was sent that was accepted."""
        accepted = sorted(self.accepted_s[tenant])
        found = ((at_s, bisect.bisect(accepted, at_s)) for at_s, _ in self.refused[tenant])
        return [accepted[i] - at_s for at_s, i in found if i < len(accepted)]


def cores(pid: int) -> list[float]:
    """CPU seconds so far of this client, the server's HTTP process, and its engine."""
    server = psutil.Process(pid)
    times = [psutil.Process().cpu_times(), server.cpu_times(), *(c.cpu_times() for c in server.children())]
    client, http, *engines = (each.user + each.system for each in times)
    return [client, http, sum(engines)]


def memory_mib(pid: int) -> float:
    """Resident memory of a process and its children."""
    server = psutil.Process(pid)
    return sum(process.memory_info().rss for process in (server, *server.children(recursive=True))) / 2**20


async def closed_loop(load: Load, seconds: float, num_calls: int) -> float:
    """Calls per second with so many at once."""
    begin = time.perf_counter()

    async def work() -> None:
        while time.perf_counter() < begin + seconds:
            await load.call("greedy")

    await asyncio.gather(*(work() for _ in range(num_calls)))
    return len(load.latencies["greedy"]) / (time.perf_counter() - begin)


async def open_loop(load: Load, rate: float, modest: float, seconds: float, pid: int) -> tuple[float, str]:
    """Poisson arrivals at `rate`, of which `modest` per second are that tenant's.

    Returns:
        The rate at which they were really sent, and the lines of a table.
    """
    rng, calls = random.Random(1), []
    begin, due, most_mib, before = time.perf_counter(), 0.0, 0.0, cores(pid)
    while due < seconds:
        await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
        calls.append(asyncio.create_task(load.call("modest" if rng.random() < modest / rate else "greedy")))
        due += rng.expovariate(rate)
        if len(calls) % 100 == 0:
            most_mib = max(most_mib, memory_mib(pid))
    took = time.perf_counter() - begin
    shares = [f"{(now - then) / took:.2f}" for now, then in zip(cores(pid), before, strict=True)]
    await asyncio.gather(*calls)
    most_mib = max(most_mib, memory_mib(pid))
    lines = []
    for tenant in ("greedy", "modest"):
        done, refused = sorted(load.latencies[tenant]), load.refused[tenant]
        p95 = done[int(len(done) * 0.95)] if done else float("nan")
        told, really = median([told for _, told in refused]), median(load.waits(tenant))
        lines.append(
            f"{tenant:7} {len(done) + len(refused):6} {len(done):8} {len(refused):7} {median(done):7.2f} {p95:7.2f}"
            f" {told:7.0f} {really:9.2f} {most_mib:11.0f}  {' '.join(shares)}"
        )
    return len(calls) / took, "\n".join(lines)


def median(values: list[float]) -> float:
    """Not a number where there are none."""
    return statistics.median(values or [float("nan")])


async def measure(url: str, pid: int, arguments: argparse.Namespace) -> None:
    """Print the table."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        def load() -> Load:
            return Load(client, arguments.words, arguments.tokens)

        num_calls = arguments.max_live_calls * 4 // 5
        await closed_loop(load(), 1, num_calls)
        rate = await closed_loop(load(), arguments.seconds / 2, num_calls)
        print(f"sustainable: {rate:.1f} calls/s")
        print(HEADER)
        for factor in (0.8, 2, 10):
            sent, table = await open_loop(load(), factor * rate, 0.1 * rate, arguments.seconds, pid)
            print("\n".join(f"{sent / rate:4.1f}x {line}" for line in table.splitlines()), flush=True)


def main() -> None:
    """Start the server, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="macaw-demo")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--max-live-calls", type=int, default=64)
    parser.add_argument("--words", type=int, default=96, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        tenants = Path(folder, "tenants.toml")
        tenants.write_text(TENANTS)
        flags = ["--port", "0", "--tenants", str(tenants), "--max-live-calls", str(arguments.max_live_calls)]
        flags += ["--max-model-len", "1024", "--kv-memory", "256MiB"]  # soon full: what grows then is the server
        command = [sys.executable, "-m", "macaw_server", "serve", arguments.model, *flags]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            url = next(found[1] for line in server.stderr if (found := re.search(r"serving at (http://\S+)/v1", line)))
            asyncio.run(measure(url, server.pid, arguments))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
