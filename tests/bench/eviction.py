"""Orders of eviction compared: plain LRU against by value, simulated with a small KV pool, the same programs.

    python tests/bench/eviction.py
    python tests/bench/eviction.py --case agents:1500 --case gpts:300:1 --seeds 5

A case is WORKLOAD:PAGES[:CHATS], with so many chats per second on top. A ratio is what LRU takes over what value takes:
above 1, value is faster. Everything is seeded, so it comes out the same everywhere.
"""

from __future__ import annotations

import argparse
import statistics

from macaw_server.kvcache import Eviction
from macaw_server.scheduler import StepTimeModel
from macaw_server.simulate.records import ProgramRecord
from macaw_server.simulate.virtual import Simulation, SimulationConfig
from macaw_server.workloads import WorkloadOptions, make_workload

CASES = (
    *("agents:800", "agents:1200", "agents:1500", "agents:1800", "agents:1500:1", "agents:2000:1"),
    *("gpts:300", "gpts:450", "gpts:300:1", "gpts:600:1"),
    *("multi-agent:300", "multi-agent:500", "multi-agent:500:1"),
    *("chain-summary:400", "map-reduce:300", "copilot:400", "mixed:400"),
)
OPTIONS = {"multi-agent": {"scale": 0.1, "num_programs": 16}, "gpts": {"num_programs": 64, "rate": 0.5}}
"""Where they are not those of the workload, at a scale of 0.25."""


def simulated(case: str, eviction: Eviction, seed: int) -> dict[str, list[ProgramRecord]]:
    """The programs by app."""
    name, pages, *chats = case.split(":")
    options = {"scale": 0.25, "background": float(chats[0]) if chats else 0.0, **OPTIONS.get(name, {})}
    config = SimulationConfig(num_pages=int(pages), eviction=eviction)
    programs = make_workload(name, WorkloadOptions(seed, **options))  # type: ignore[arg-type]
    found: dict[str, list[ProgramRecord]] = {}
    for record in Simulation(config, StepTimeModel(), programs).run().programs:
        assert record.error is None, f"{record.spec.id}: {record.error}"
        found.setdefault(record.spec.app.split("/")[0], []).append(record)
    return found


def hit_share(records: list[ProgramRecord]) -> float:
    calls = [call for record in records for call in record.calls.values()]
    return sum(call.cached_tokens for call in calls) / sum(call.prompt_len for call in calls)


def mean_s(records: list[ProgramRecord]) -> float:
    return statistics.fmean(record.latency_s for record in records)


def p90_s(records: list[ProgramRecord]) -> float:
    return statistics.quantiles((record.latency_s for record in records), n=10, method="inclusive")[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="WORKLOAD:PAGES[:CHATS]")
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args()
    print(f"{'case':18} {'app':13} {'hits lru':>9} {'value':>6}  mean latency          p90")
    for case in arguments.case or CASES:
        lru, value = ([simulated(case, how, seed) for seed in range(arguments.seeds)] for how in ("lru", "value"))
        for app in lru[0]:
            pairs = [(a[app], b[app]) for a, b in zip(lru, value, strict=True)]
            before, after = (statistics.fmean(map(hit_share, side)) for side in zip(*pairs, strict=True))
            ratios = [mean_s(a) / mean_s(b) for a, b in pairs]
            p90 = statistics.geometric_mean(p90_s(a) / p90_s(b) for a, b in pairs)
            print(
                f"{case:18} {app:13} {before:9.1%} {after:6.1%}  {statistics.geometric_mean(ratios):5.3f} "
                f"({min(ratios):.3f} - {max(ratios):.3f})  {p90:5.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
