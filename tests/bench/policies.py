"""Scheduling policies compared: fcfs against app, simulated or on a real engine, the same programs in alternation.

    python tests/bench/policies.py mixed --scale 0.25
    python tests/bench/policies.py mixed --scale 0.1 --model FOLDER --rounds 3

A ratio is what fcfs takes over what app takes: above 1, app is faster. Both answer every call with as many tokens.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from macaw_server.config import EngineConfig
from macaw_server.scheduler import StepTimeModel
from macaw_server.simulate.records import RunResult
from macaw_server.simulate.virtual import Simulation, SimulationConfig
from macaw_server.workloads import ProgramSpec, WorkloadOptions, make_workload

POLICIES = ("fcfs", "app")
Run = Callable[[list[ProgramSpec]], RunResult]


def simulated(policy: str) -> Run:
    config = SimulationConfig(policy=policy)
    return lambda programs: Simulation(config, StepTimeModel(), programs).run()


def real(policy: str, arguments: argparse.Namespace) -> Run:
    from macaw_server.engine.core import EngineCore
    from macaw_server.simulate.real import RealRun, warm_up

    config = EngineConfig(
        model=arguments.model,
        policy=policy,
        kv_memory=arguments.kv_memory,
        threads=2,
        max_num_seqs=arguments.max_num_seqs,
    )
    core = EngineCore(config)
    warm_up(core)
    return lambda programs: RealRun(core, programs).run()


def latencies(result: RunResult) -> dict[tuple[str, str], float]:
    """Medians by app: of programs, and of calls per output token."""
    programs, tokens = defaultdict(list), defaultdict(list)
    for record in result.programs:
        assert record.error is None, f"{record.spec.id}: {record.error}"
        programs[record.spec.app].append(record.latency_s)
        for call in record.calls.values():
            tokens[record.spec.app].append((call.ended_s - call.ready_s) / call.output_len)
    found = {}
    for app in programs:
        found[app, "program, median"] = statistics.median(programs[app])
        found[app, "program, mean"] = statistics.fmean(programs[app])
        found[app, "call per token, median"] = statistics.median(tokens[app])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload")
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--programs", type=int)
    parser.add_argument("--speedup", type=float, default=1.0, help="of all arrivals")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="a real engine, of this model; default: simulated")
    parser.add_argument("--kv-memory", type=int, default=2**30)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    arguments = parser.parse_args()
    runs = {name: real(name, arguments) if arguments.model else simulated(name) for name in POLICIES}
    ratios = defaultdict(list)
    for seed in range(arguments.rounds):
        options = WorkloadOptions(seed, arguments.scale, arguments.programs)
        made = make_workload(arguments.workload, options)
        programs = [replace(spec, arrival_s=spec.arrival_s / arguments.speedup) for spec in made]
        took = {}
        for name in POLICIES if seed % 2 == 0 else reversed(POLICIES):  # a tenant of its own has a cold cache
            specs = [replace(spec, tenant=f"{name}/{seed}") for spec in programs]
            result = runs[name](specs)
            took[name] = latencies(result)
            print(f"round {seed}, {name}: {result.duration_s:.1f} s, {result.num_steps} steps", flush=True)
        for key, seconds in took["app"].items():
            ratios[key].append(took["fcfs"][key] / seconds)
        print(f"ratios of {seed + 1} rounds")
        for (app, what), found in sorted(ratios.items()):
            print(
                f"{app:18} {what:24} {statistics.median(found):6.2f} ({min(found):.2f} - {max(found):.2f})", flush=True
            )


if __name__ == "__main__":
    main()
