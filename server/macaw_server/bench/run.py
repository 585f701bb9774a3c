"""From the options of `macaw bench engine` to its report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from rich.console import Console

from macaw_server.bench.cases import Case, make_cases
from macaw_server.bench.client import Side
from macaw_server.bench.engine import Result, run_cases
from macaw_server.bench.errors import BenchError
from macaw_server.bench.facts import command, commit, load, machine
from macaw_server.bench.limits import measure_machine, model_cost, upper_bound
from macaw_server.bench.report import Report
from macaw_server.bench.server import started

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """As the command's help says."""

    peer: str
    url: str | None
    model: str | None
    serve_flags: Sequence[str]
    dtype: str
    concurrency: Sequence[int]
    prefix_len: int
    own_len: int
    output_len: int
    patterns: Sequence[str]
    num_rounds: int
    ids: range
    seed: int
    api_key: str | None
    peer_api_key: str | None
    timeout_s: float


def run(options: Options, console: Console) -> Report:
    """Measure the machine, then the two servers.

    Raises:
        BenchError: Options that contradict each other, or a measurement that would mislead.
        StartupError: No such model.
    """
    if options.url is None and options.model is None:
        raise BenchError("There is no Macaw to measure. Give --url of a running one, or --model to start one with.")
    if options.url is not None and options.serve_flags:
        raise BenchError(
            f"{' '.join(options.serve_flags)} is for a server that is started, and --url names one that runs. "
            "Give one or the other."
        )
    cases = make_cases(options.concurrency, options.prefix_len, options.own_len, options.output_len, options.patterns)
    facts = {
        "command": command([options.api_key, options.peer_api_key]),
        "commit": commit(),
        "machine": machine(),
        "load": load(),
        "seed": str(options.seed),
    }
    with console.status("measuring the machine") as status:
        limits = _limits(options, cases, facts)
        with ExitStack() as stack:
            url = options.url
            if url is None:
                assert options.model is not None
                status.update("starting macaw serve")
                url = stack.enter_context(started(options.model, options.dtype, options.serve_flags))
            sides = [
                Side("macaw", url, options.api_key, options.timeout_s),
                Side("peer", options.peer, options.peer_api_key, options.timeout_s),
            ]
            results = asyncio.run(_measure(sides, cases, options, status.update))
    facts["peer"] = f"{sides[1].software}, model {sides[1].model}"
    return Report(results, limits, facts)


async def _measure(
    sides: Sequence[Side], cases: Sequence[Case], options: Options, on_progress: Callable[[str], object]
) -> list[Result]:
    async with sides[0], sides[1]:
        return await run_cases(
            cases, sides, num_rounds=options.num_rounds, ids=options.ids, seed=options.seed, on_progress=on_progress
        )


def _limits(options: Options, cases: Sequence[Case], facts: dict[str, str]) -> dict[str, float]:
    """The bound of each case by name; none where it is not known, and the facts say why."""
    if options.dtype not in _DTYPES:
        raise BenchError(f"--dtype {options.dtype!r} was given; {', '.join(_DTYPES)} are accepted.")
    if options.model is None:
        facts["limit"] = "not known without --model"
        return {}
    dtype = _DTYPES[options.dtype]
    cost = model_cost(options.model, dtype)
    if cost is None:
        facts["limit"] = "not known for models with experts or sliding windows"
        return {}
    rates = measure_machine(dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    facts["limit"] = (
        f"{rates.bytes_per_s / 1e9:.1f} GB/s read, {rates.flops_per_s / 1e9:,.0f} GFLOP/s, "
        f"{cost.weight_bytes / 1e6:,.0f} MB of weights"
    )
    return {case.name: upper_bound(case, cost, rates) for case in cases}
