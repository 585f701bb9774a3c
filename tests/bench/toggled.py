"""What each mechanism brings alone on a real engine, switched on and off in alternation within one process.

    python tests/bench/toggled.py map-reduce chain-summary --model FOLDER --dtype bfloat16 --rounds 20

Two servers of one kind differ by 5 to 10% for as long as they live, which hides a loss of 3%; here all sides have the
same process, weights and pages. Between two runs, when nothing is running, the engine gets a new scheduler with an
empty cache, without what is switched off. In every round each side runs the same programs once, in an order that is
drawn anew, and is measured by their mean latency. A ratio is a side's median over the rounds over that with everything
on: above 1 the mechanism is a gain. *nothing* lacks nothing: what it shows is noise. (With everything on there are thus
two runs in a round; the other sides are compared with both.) In brackets a 95% confidence interval (bootstrap over the
rounds); in the same way the CPU seconds of the server. Noise comes in bursts, so runs of a few seconds and many rounds
show most.

The server is a `LocalServer` in a process of its own: engine and event loop are threads of one interpreter, so
what Python does for a mechanism costs more than it does under `macaw serve`. Answers are not compared here:
`macaw bench --ablate` does that.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from macaw_server.bench.workload.clients import WorkloadClient
from macaw_server.bench.workload.records import Run
from macaw_server.bench.workload.texts import Texts
from macaw_server.config import EngineConfig, ServerConfig
from macaw_server.models.loader import load_tokenizer
from macaw_server.workloads import WORKLOADS, ProgramSpec, WorkloadOptions, make_workload

ON = "everything"
CONTROL = "nothing"
API_KEY = "sk-bench"
NUM_RESAMPLES = 2000
SWITCHES: dict[str, dict[str, Any]] = {
    "prefix-caching": {"prefix_caching": False, "prefill_ahead": False, "pipelining": False},
    "two-phase": {"sharing": "never"},
    "single-flight": {"single_flight": False},
    "policy": {"policy": "fcfs"},
    "task-groups": {"task_groups": False},
    "prefill-ahead": {"prefill_ahead": False},
    "pipelining": {"pipelining": False},
    "eviction": {"eviction": "lru"},
}
"""What differs in the configuration, of the engine or of the programs, without each mechanism."""


def serve(pipe: Connection, config: dict[str, Any]) -> None:
    """A server that changes its configuration by what comes through the pipe, and answers with its CPU seconds."""
    from macaw_server.engine import core as engine_core
    from macaw_server.serve import LocalServer

    made: list[Any] = []

    class Core(engine_core.EngineCore):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    engine_core.EngineCore = Core  # type: ignore[misc,assignment]
    sys.setswitchinterval(5e-4)  # or the engine waits 5 ms for an event loop that is busy
    with LocalServer(**config) as server:
        core, service = made[0], server.service
        assert service is not None
        usual, planners = core._config, dict(core._runner._planners)
        unshared = {heads: _unshared(planner, heads, usual.page_size) for heads, planner in planners.items()}
        gc.collect()
        gc.freeze()
        pipe.send(server.url)
        while (off := pipe.recv()) is not None:
            while core.has_work:
                time.sleep(0.01)
            of_engine = {name: value for name, value in off.items() if name in EngineConfig.model_fields}
            core._config = usual.model_copy(update=of_engine)
            core._runner._planners = unshared if core._config.sharing == "never" else planners
            core._scheduler = core._new_scheduler()
            of_programs = {name: value for name, value in off.items() if name not in of_engine}
            service._surroundings = replace(service._surroundings, config=replace(service.config, **of_programs))
            gc.collect()
            pipe.send(time.process_time())


def _unshared(planner: Any, heads: Any, page_size: int) -> Any:
    from macaw_kernels import NEVER_SHARE

    return type(planner)(heads, NEVER_SHARE, page_size)


class Bench:
    """The server, and runs on it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        config = {"model": arguments.model, "dtype": arguments.dtype, "api_key": (API_KEY,)}
        config |= {name.replace("-", "_"): value for name, value in (flag.split("=", 1) for flag in arguments.serve)}
        self._model = ServerConfig(**config).model_name
        self._arguments = arguments
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, config), daemon=True)
        self._process.start()
        self._url: str = self._pipe.recv()
        tokenizer = load_tokenizer(EngineConfig(model=arguments.model))
        self._texts, self._chat = Texts(tokenizer, arguments.seed), bool(tokenizer.chat_template)

    def close(self) -> None:
        """End the server."""
        self._pipe.send(None)
        self._process.join()

    def _switch(self, side: str) -> float:
        self._pipe.send(SWITCHES.get(side, {}))
        return float(self._pipe.recv())

    def run(self, side: str, programs: Sequence[ProgramSpec]) -> tuple[Run, float]:
        """Run programs on one side; also the CPU seconds that the server spent."""
        begin_s = self._switch(side)
        run = asyncio.run(self._run(programs))
        return run, self._switch(ON) - begin_s

    async def _run(self, programs: Sequence[ProgramSpec]) -> Run:
        rtt_s = self._arguments.rtt_ms / 1000
        async with WorkloadClient(
            self._url, self._model, API_KEY, "programs", self._texts, chat=self._chat, rtt_s=rtt_s
        ) as client:
            return await client.run(programs)


Rounds = list[list[float]]
"""Of each round, what each run of a side measured."""


def ratio(side: Rounds, on: Rounds) -> tuple[float, float, float]:
    """The median of one side over that of another, and a 95% confidence interval: bootstrap over the rounds."""

    def of(rounds: Sequence[int]) -> float:
        return _median(side[i] for i in rounds) / _median(on[i] for i in rounds)

    resampled = random.Random(0)
    found = sorted(of(resampled.choices(range(len(on)), k=len(on))) for _ in range(NUM_RESAMPLES))
    return of(range(len(on))), found[int(0.025 * NUM_RESAMPLES)], found[int(0.975 * NUM_RESAMPLES)]


def _median(rounds: Iterable[list[float]]) -> float:
    return statistics.median(value for values in rounds for value in values)


def measure(bench: Bench, workload: str, arguments: argparse.Namespace) -> None:
    """Print the ratios of one workload."""
    options = WorkloadOptions(arguments.seed, arguments.scale, arguments.programs)
    programs = [_faster(spec, arguments.speed) for spec in make_workload(workload, options)]
    order = random.Random(arguments.seed)
    latency_s: dict[tuple[str, str], Rounds] = {}
    cpu_s: dict[str, Rounds] = {}
    bench.run(ON, programs)
    for i in range(arguments.rounds):
        begin = time.perf_counter()
        for side in order.sample([ON, CONTROL, *arguments.switches], len(arguments.switches) + 2):
            run, seconds = bench.run(side, programs)
            cpu_s.setdefault(side, []).append([seconds])
            for app in run.apps:
                mean_s = statistics.fmean(outcome.latency_s for outcome in run.of(app))
                latency_s.setdefault((app, side), []).append([mean_s])
        print(f"{workload}, round {i + 1}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    for app in run.apps:
        for side in (CONTROL, *arguments.switches):
            on = [latency_s[app, ON], cpu_s[ON]]
            if side != CONTROL:
                on = [_merged(on[0], latency_s[app, CONTROL]), _merged(on[1], cpu_s[CONTROL])]
            cells = (ratio(latency_s[app, side], on[0]), ratio(cpu_s[side], on[1]))
            latency, cpu = ("{:.3f} ({:.3f} - {:.3f})".format(*cell) for cell in cells)
            print(f"| `{workload}` | {app} | {side} | {latency} | {cpu} |", flush=True)


def _merged(first: Rounds, second: Rounds) -> Rounds:
    return [a + b for a, b in zip(first, second, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--switches", nargs="+", choices=SWITCHES, default=list(SWITCHES))
    parser.add_argument("--model", default="macaw-demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scale", type=float, default=0.05, help="of the lengths")
    parser.add_argument("--speed", type=float, default=4.0, help="of arrivals and gaps")
    parser.add_argument("--programs", type=int, help="of a workload; default: its own number")
    parser.add_argument("--rtt-ms", type=float, default=50.0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs="*", default=[], help="name=value, of the server's configuration")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    print("| | app | without | latency | CPU time |\n|---|---|---|--:|--:|")
    for workload in arguments.workloads:
        measure(bench, workload, arguments)
    bench.close()


def _faster(spec: ProgramSpec, speed: float) -> ProgramSpec:
    calls = tuple(replace(call, gap_s=call.gap_s / speed) for call in spec.calls)
    return replace(spec, arrival_s=spec.arrival_s / speed, calls=calls)


if __name__ == "__main__":
    main()
