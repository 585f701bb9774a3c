"""Holds the simulator against a real engine: the same programs on both, and the error of each latency."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.scheduler import StepTimeModel
from macaw_server.simulate.real import RealRun, config_of, warm_up
from macaw_server.simulate.virtual import Simulation
from macaw_server.workloads import WorkloadOptions, make_workload


@dataclass(frozen=True, slots=True)
class Checked:
    """One workload on both.

    Attributes:
        workload: Its name.
        num_programs, num_calls: Of all rounds.
        real_s, simulated_s: Median program latency.
        error: Median of the programs' relative errors, without sign.
        worst_decile: The error that nine programs in ten stay below.
        bias: Median relative error with sign: above 0 the simulator is too slow.
    """

    workload: str
    num_programs: int
    num_calls: int
    real_s: float
    simulated_s: float
    error: float
    worst_decile: float
    bias: float


def check(
    core: EngineCore,
    engine: EngineConfig,
    step_time: StepTimeModel,
    workloads: Sequence[str],
    options: WorkloadOptions,
    *,
    num_rounds: int = 1,
    on_progress: Callable[[str], object] = lambda _: None,
) -> list[Checked]:
    """Run each workload on the engine and on the simulator, which sees nothing of the engine's run.

    Args:
        core: A loaded engine with nothing to do.
        engine: Its configuration.
        step_time: The simulator's; not changed.
        workloads: By name.
        options: Of all of them.
        num_rounds: Runs of each on both, with other seeds, and cold caches each time.
        on_progress: Told what goes on.
    """
    warm_up(core)
    return [_check(core, engine, step_time, name, options, num_rounds, on_progress) for name in workloads]


def _check(
    core: EngineCore,
    engine: EngineConfig,
    step_time: StepTimeModel,
    name: str,
    options: WorkloadOptions,
    num_rounds: int,
    on_progress: Callable[[str], object],
) -> Checked:
    pairs: list[tuple[float, float]] = []
    num_calls = 0
    for i in range(num_rounds):
        on_progress(f"{name}, round {i + 1} of {num_rounds}")
        # A tenant of its own finds nothing in the cache.
        made = make_workload(name, replace(options, seed=options.seed + i))
        programs = [replace(spec, tenant=f"check/{name}/{i}/{spec.tenant}") for spec in made]
        real = {record.spec.id: record for record in RealRun(core, programs).run().programs}
        for record in Simulation(config_of(core, engine), step_time, programs).run().programs:
            if record.error != real[record.spec.id].error:
                raise RuntimeError(f"{record.spec.id}: simulated {record.error}, real {real[record.spec.id].error}")
            pairs.append((real[record.spec.id].latency_s, record.latency_s))
            num_calls += len(record.calls)
    errors = [simulated / measured - 1 for measured, simulated in pairs]
    sizes = sorted(map(abs, errors))
    return Checked(
        workload=name,
        num_programs=len(pairs),
        num_calls=num_calls,
        real_s=statistics.median(measured for measured, _ in pairs),
        simulated_s=statistics.median(simulated for _, simulated in pairs),
        error=statistics.median(sizes),
        worst_decile=sizes[int(0.9 * (len(sizes) - 1))],
        bias=statistics.median(errors),
    )
