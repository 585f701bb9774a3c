"""`macaw simulate WORKLOAD|TRACE`: one run for each policy, and what is told of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from macaw_server.errors import StartupError
from macaw_server.scheduler import StepTimeModel, make_policy
from macaw_server.simulate.model_file import ModelFile
from macaw_server.simulate.report import as_json, print_report
from macaw_server.simulate.summary import summarize
from macaw_server.simulate.virtual import Client, Simulation, SimulationConfig
from macaw_server.workloads import WORKLOADS, ProgramSpec, WorkloadOptions, make_workload, read_trace, write_trace

__all__ = ["StartupError", "run"]


def run(
    what: str,
    options: WorkloadOptions,
    *,
    policies: Sequence[str],
    limits: dict[str, Any],
    num_engines: int,
    client: str,
    rtt_s: float,
    slo: float,
    step_time: Path | None,
    write_trace_to: Path | None,
    console: Console,
) -> str:
    """Simulate, print the table, and return everything as JSON.

    Args:
        what: Name of a workload, or path of a trace.
        options: Of a workload.
        policies: By name; each runs the same programs.
        limits: Fields of `SimulationConfig` that differ from the step-time file's, or the defaults.
        num_engines: See `SimulationConfig`.
        client: See `SimulationConfig`.
        rtt_s: See `SimulationConfig`.
        slo: See `summarize`.
        step_time: File of a fitted model.
        write_trace_to: File for the programs as a trace.
        console: For the table.

    Raises:
        ValueError: An argument is none of what it can be.
        StartupError: The step-time file is none.
        OSError: A file cannot be read or written.
    """
    if client not in get_args(Client):
        raise ValueError(f"No client {client!r}; choose one of {', '.join(get_args(Client))}.")
    for policy in policies:
        make_policy(policy)
    known = ModelFile.load(step_time) if step_time else ModelFile(StepTimeModel())
    fields: dict[str, Any] = {**known.limits, **limits}
    config = SimulationConfig(num_engines=num_engines, client=client, rtt_s=rtt_s, **fields)  # type: ignore[arg-type]
    if write_trace_to is not None:
        write_trace(_programs(what, options), write_trace_to)
    summaries = []
    for policy in policies:
        each = replace(config, policy=policy)
        result = Simulation(each, known.step_time, _programs(what, options)).run()
        summaries.append(summarize(result, each, known.step_time, slo=slo))
    facts = _facts(what, options, config, known, step_time)
    print_report(console, summaries, facts, slo=slo)
    return as_json(summaries, facts)


def _programs(what: str, options: WorkloadOptions) -> Iterable[ProgramSpec]:
    if what in WORKLOADS:
        return make_workload(what, options)
    path = Path(what)
    if not path.is_file():
        raise ValueError(f"{what!r} is neither a workload ({', '.join(sorted(WORKLOADS))}) nor the file of a trace.")
    return read_trace(path)


def _facts(
    what: str, options: WorkloadOptions, config: SimulationConfig, known: ModelFile, step_time: Path | None
) -> dict[str, str]:
    coefficients = ", ".join(f"{name} {value:.3g}" for name, value in known.step_time.coefficients._asdict().items())
    where = f"{step_time} ({known.facts.get('model', 'unknown model')})" if step_time else "built-in (135M, two cores)"
    facts = {
        "engines": f"{config.num_engines} x {config.num_pages:,} pages of {config.page_size}, {config.max_num_seqs} "
        f"sequences, {config.max_num_batched_tokens} tokens a step; client sends {config.client}, "
        f"round trip {1000 * config.rtt_s:g} ms",
        "step time": f"{where}: {coefficients} ms",
    }
    if what in WORKLOADS:
        shares = ",".join(f"{share:g}" for share in options.tenants)
        facts["workload"] = f"{what}, seed {options.seed}, scale {options.scale:g}, tenants {shares}"
    else:
        facts["workload"] = what
    return facts
