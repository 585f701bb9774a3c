"""One and ten times the load that a server can do: latency of what is accepted, refusals, and memory.

    python tests/bench/overload.py [--seconds 20] [--max-live-calls 64]

A server process with macaw-demo and two tenants. First a closed loop measures the sustainable rate. Then open loops
send calls at 0.8, 2 and 10 times that rate for a while, most of them by *greedy*; *modest* sends a tenth of the
sustainable rate each time. Printed are, per tenant: calls sent, accepted, refused (429), latency of the accepted
ones (median and 95th percentile), and the `Retry-After` that the refused were told (median); and the memory of all of
the server's processes. Flat means that 10x differs from 2x in the number of refusals only.
"""

from __future__ import annotations

import argparse
import asyncio
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
TOKENS = 16


class Load:
    """Sends calls, and takes down what became of them."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._sent = 0
        self.latencies: dict[str, list[float]] = defaultdict(list)
        self.retries: dict[str, list[float]] = defaultdict(list)

    async def call(self, tenant: str) -> None:
        """One call with a prompt of its own."""
        self._sent += 1
        prompt = f"{self._sent} " * 48
        body = {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
        begin = time.perf_counter()
        response = await self._client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {tenant}"})
        if response.status_code == 429:
            self.retries[tenant].append(float(response.headers["retry-after"]))
            return
        usage = response.raise_for_status().json()["usage"]
        if usage["completion_tokens"] != TOKENS:
            raise SystemExit(f"{usage['completion_tokens']} tokens, {TOKENS} were asked for.")
        self.latencies[tenant].append(time.perf_counter() - begin)


def memory_mib(pid: int) -> float:
    """Resident memory of a process and its children."""
    server = psutil.Process(pid)
    return sum(process.memory_info().rss for process in (server, *server.children(recursive=True))) / 2**20


async def closed_loop(client: httpx.AsyncClient, seconds: float) -> float:
    """Calls per second with as many at once as are taken."""
    load, end = Load(client), time.perf_counter() + seconds

    async def work() -> None:
        while time.perf_counter() < end:
            await load.call("greedy")

    begin = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(16)))
    return len(load.latencies["greedy"]) / (time.perf_counter() - begin)


async def open_loop(client: httpx.AsyncClient, rate: float, modest: float, seconds: float, pid: int) -> str:
    """Poisson arrivals at `rate`, of which `modest` per second are that tenant's; the lines of a table."""
    load, rng, calls = Load(client), random.Random(1), []
    begin, due, most_mib = time.perf_counter(), 0.0, 0.0
    while due < seconds:
        await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
        calls.append(asyncio.create_task(load.call("modest" if rng.random() < modest / rate else "greedy")))
        due += rng.expovariate(rate)
        if len(calls) % 100 == 0:
            most_mib = max(most_mib, memory_mib(pid))
    await asyncio.gather(*calls)
    most_mib = max(most_mib, memory_mib(pid))
    lines = []
    for tenant in ("greedy", "modest"):
        done, retries = sorted(load.latencies[tenant]), load.retries[tenant]
        p95 = done[int(len(done) * 0.95)] if done else float("nan")
        lines.append(
            f"{tenant:7} {len(done) + len(retries):6} {len(done):9} {len(retries):8} "
            f"{statistics.median(done or [float('nan')]):8.2f} {p95:8.2f} "
            f"{statistics.median(retries or [float('nan')]):12.0f} {most_mib:10.0f}"
        )
    return "\n".join(lines)


async def measure(url: str, seconds: float, pid: int) -> None:
    """Print the table."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await closed_loop(client, 3)
        rate = await closed_loop(client, seconds / 2)
        print(f"sustainable: {rate:.1f} calls/s")
        print("load   tenant    sent  accepted  refused  p50 s    p95 s    Retry-After s  memory MiB")
        for factor in (0.8, 2, 10):
            table = await open_loop(client, factor * rate, 0.1 * rate, seconds, pid)
            print("\n".join(f"{factor:4}x  {line}" for line in table.splitlines()))


def main() -> None:
    """Start the server, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--max-live-calls", type=int, default=64)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        tenants = Path(folder, "tenants.toml")
        tenants.write_text(TENANTS)
        flags = ["--port", "0", "--tenants", str(tenants), "--max-live-calls", str(args.max_live_calls)]
        command = [sys.executable, "-m", "macaw_server", "serve", "macaw-demo", "--max-model-len", "1024", *flags]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            url = next(found[1] for line in server.stderr if (found := re.search(r"serving at (http://\S+)/v1", line)))
            asyncio.run(measure(url, args.seconds, server.pid))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
