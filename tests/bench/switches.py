"""What each mechanism of scheduling brings alone: simulated, with everything on and with one switch off.

    python tests/bench/switches.py
    python tests/bench/switches.py --workloads mixed multi-agent --seeds 5

A ratio is the mean latency of the programs without the mechanism over that with it: above 1 it is a gain. The programs
are the same, and step times are the built-in ones of a 135M model on two cores. Everything is seeded, so it comes out
the same everywhere. What attention shares and what is prefilled ahead is not simulated: `macaw bench --ablate` measures
those.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

from macaw_server.scheduler import StepTimeModel
from macaw_server.simulate.virtual import Simulation, SimulationConfig
from macaw_server.workloads import WorkloadOptions, make_workload

SWITCHES: dict[str, dict[str, Any]] = {
    "prefix-caching": {"prefix_caching": False},
    "single-flight": {"single_flight": False},
    "policy": {"policy": "fcfs"},
    "task-groups": {"task_groups": False},
    "eviction": {"eviction": "lru"},
    "placement": {"placement": "least-loaded"},
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"scale": 0.25} for name in ("chain-summary", "map-reduce", "copilot", "mixed", "agents")},
    "multi-agent": {"scale": 0.1, "num_programs": 16},
    "gpts": {"scale": 0.25, "num_programs": 64, "rate": 0.5},
}
"""Of each workload: the options, such that a server of that speed keeps up."""


def mean_s(workload: str, seed: int, config: SimulationConfig) -> dict[str, float]:
    """Latency by app."""
    programs = make_workload(workload, WorkloadOptions(seed, **CASES[workload]))
    found: dict[str, list[float]] = {}
    for record in Simulation(config, StepTimeModel(), programs).run().programs:
        assert record.error is None, f"{record.spec.id}: {record.error}"
        found.setdefault(record.spec.app.split("/")[0], []).append(record.latency_s)
    return {app: statistics.fmean(latencies) for app, latencies in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"| | app | {' | '.join(SWITCHES)} |\n|---|---|{'--:|' * len(SWITCHES)}")
    for workload in arguments.workloads:
        ratios: dict[str, dict[str, list[float]]] = {}
        for seed in range(arguments.seeds):
            whole = {n: mean_s(workload, seed, SimulationConfig(num_engines=n)) for n in (1, 2)}
            for switch, off in SWITCHES.items():
                config = replace(SimulationConfig(num_engines=2 if switch == "placement" else 1), **off)
                for app, seconds in mean_s(workload, seed, config).items():
                    ratio = seconds / whole[config.num_engines][app]
                    ratios.setdefault(app, {}).setdefault(switch, []).append(ratio)
        for app, by_switch in ratios.items():
            cells = (f"{statistics.median(r):.2f} ({min(r):.2f} - {max(r):.2f})" for r in by_switch.values())
            print(f"| `{workload}` | {app} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
