"""From the options of `macaw bench WORKLOAD` to its report."""

from __future__ import annotations

import asyncio
import gc
import secrets
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from macaw_server.bench.errors import BenchError
from macaw_server.bench.facts import command, commit, load, machine
from macaw_server.bench.server import started
from macaw_server.bench.workload.clients import WorkloadClient
from macaw_server.bench.workload.probe import Probe, probe
from macaw_server.bench.workload.rates import RateResult
from macaw_server.bench.workload.records import Run
from macaw_server.bench.workload.report import CaseResult, WorkloadReport
from macaw_server.bench.workload.sides import Side, choose_sides, left_out
from macaw_server.bench.workload.sustain import SearchOptions, programs_at, sample, search_rates
from macaw_server.bench.workload.texts import Texts
from macaw_server.config import EngineConfig
from macaw_server.models.loader import load_tokenizer
from macaw_server.workloads import ProgramSpec, WorkloadOptions, make_workload

NUM_CHECKED = 3
"""Programs whose answers are compared before anything is timed."""
_CHECKED_GAP_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """As the command's help says.

    Attributes:
        workloads: Names.
        rates: Of the first stream's programs, per second; None is the workload's own.
        speed: Arrivals and the client's gaps are so many times faster.
        search: The highest rates are searched that the sides sustain, and `rates` is the one None; None: they are not.
    """

    workloads: Sequence[str]
    options: WorkloadOptions
    rates: Sequence[float | None]
    speed: float
    rtts_ms: Sequence[float]
    model: str
    dtype: str
    serve_flags: Sequence[str]
    peer: str | None
    ablate: Sequence[str]
    baselines: Sequence[str]
    num_rounds: int
    slo_token_ms: float | None
    search: SearchOptions | None = None


class Case(NamedTuple):
    """One workload at one distance and one load."""

    workload: str
    rtt_ms: float
    rate: float | None

    @property
    def name(self) -> str:
        """For tables and files."""
        return self.series + (f", {self.rate:g}/s" if self.rate is not None else "")

    @property
    def series(self) -> str:
        """Without the load."""
        return f"{self.workload}, {self.rtt_ms:g} ms"


def run(options: BenchOptions, console: Console) -> WorkloadReport:
    """Start a server for each side, run every case on all of them in turn, and begin again in the next round.

    Servers are new in every round: two of one kind differ by up to 10% for as long as they live.

    Raises:
        BenchError: Options that contradict each other, a failed request, or answers that differ.
        StartupError: No such model.
    """
    sides = choose_sides(options.ablate, options.peer, options.baselines, options.serve_flags)
    search = options.search
    cases = [Case(*values) for values in product(options.workloads, options.rtts_ms, options.rates)]
    # Every run is a tenant of its own, so that each begins with a cold cache on a warm server. A search is one tenant:
    # what programs share is in the cache, as it is when a rate is kept up for long.
    runs = () if search else range(options.num_rounds)
    keys = {(case, i): secrets.token_hex(16) for case in cases for i in (-1, *runs)}
    facts = {"command": command([]), "commit": commit(), "machine": machine(), "load": load()}
    facts["lengths"] = f"{options.options.scale:g} of the published ones; arrivals and gaps {options.speed:g}x as fast"
    if why := left_out(options.ablate, options.serve_flags):
        facts["left out"] = why
    texts = Texts(load_tokenizer(EngineConfig(model=options.model)), options.options.seed)
    gc.freeze()  # collections that visit transformers would be in the latencies
    if search:
        minutes = len(sides) * sum(_limit_s(case, search, options) for case in cases) / 60
        console.print(
            f"Searching the rates that {len(sides)} sides sustain, {options.num_rounds} times, in {len(cases)} "
            f"case{'s'[: len(cases) > 1]}: it takes {minutes:.0f} min at most, and half of that as a rule."
        )
    with _progress(console, timed=search is not None) as progress:
        total = _seconds(options) * len(cases) if search else 2 * options.num_rounds * len(cases)
        bar = progress.add_task("", total=len(sides) * total)
        servers: dict[Side, tuple[str, _Model]] = {}

        def start(stack: ExitStack, i: int) -> None:
            """Servers for all sides, the first of them another one in every round, until the stack is left."""
            for side in _rotated(sides, i):
                progress.update(bar, description=f"starting: {side.name}")
                flags = [*options.serve_flags, *side.flags, *(f"--api-key={key}" for key in keys.values())]
                url = side.url or stack.enter_context(started(options.model, options.dtype, flags))
                servers[side] = (url, _model(url, next(iter(keys.values()))))

        def client(side: Side, case: Case, i: int) -> WorkloadClient:
            url, model = servers[side]
            key, rtt_s = keys[case, i], case.rtt_ms / 1000
            return WorkloadClient(url, model.name, key, side.way, texts, chat=model.chat, rtt_s=rtt_s)

        def on_side(side: Side, case: Case, i: int, programs: Sequence[ProgramSpec]) -> Run:
            progress.update(bar, description=f"{case.name}: {side.name}")
            result = asyncio.run(_run(client(side, case, i), programs, timeline=i == options.num_rounds - 1))
            progress.advance(bar, 0 if search else 1)
            return result

        if search is None:
            rounds: dict[Case, dict[str, list[Run]]] = {case: {side.name: [] for side in sides} for case in cases}
            for i in range(options.num_rounds):
                with ExitStack() as stack:
                    start(stack, i)
                    for case, by_side in rounds.items():
                        for side, result in _run_round(case, i, sides, options, on_side).items():
                            by_side[side.name].append(result)
            results = [_case_result(case, sides, by_side) for case, by_side in rounds.items()]
            return WorkloadReport(results, facts, options.slo_token_ms)

        def try_rate(side: Side, case: Case, rate: float, i: int, number: int) -> Probe:
            progress.update(bar, description=f"{case.name}: {side.name} at {rate:.3g}/s, round {i + 1}")
            programs = programs_at(case.workload, options.options, search, rate, i, str(number))
            programs = [_faster(spec, options.speed) for spec in programs]
            return asyncio.run(_probe(client(side, case, -1), programs, rate, search))

        with ExitStack() as stack:
            start(stack, 0)
            found = [
                _search_case(case, sides, options, on_side, try_rate, partial(progress.advance, bar)) for case in cases
            ]
        return WorkloadReport([], facts, options.slo_token_ms, found)


def _search_case(
    case: Case,
    sides: Sequence[Side],
    options: BenchOptions,
    on_side: Callable[[Side, Case, int, list[ProgramSpec]], Run],
    try_rate: Callable[[Side, Case, float, int, int], Probe],
    on_time: Callable[[float], None],
) -> RateResult:
    """A few programs to warm up, to compare the answers and to guess where to begin, then the search."""
    assert options.search is not None
    programs = [_faster(spec, options.speed) for spec in sample(case.workload, options.options, NUM_CHECKED)]
    checked, equal = _check(case, sides, options, on_side, programs)
    by_name = {side.name: side for side in sides}
    # Half of what a side did when it was asked for some at once, with nothing in its cache.
    starts = {side.name: len(programs) / 2 / max(o.ended_s for o in run.outcomes) for side, run in checked.items()}
    found = search_rates(
        starts,
        options.search,
        options.num_rounds,
        lambda side, rate, i, number: try_rate(by_name[side], case, rate, i, number),
        on_time,
    )
    return RateResult(case.workload, case.name, options.search, found, equal)


def _check(
    case: Case,
    sides: Sequence[Side],
    options: BenchOptions,
    on_side: Callable[[Side, Case, int, list[ProgramSpec]], Run],
    programs: list[ProgramSpec],
) -> tuple[dict[Side, Run], float]:
    """Run `programs` on all sides and compare the answers; gives the runs, and how many answers are the same.

    Raises:
        BenchError: Answers differ that must not.
    """
    checked = {side: on_side(side, case, -1, programs) for side in sides}
    equal = _share_equal([run for side, run in checked.items() if side.url is None])
    if equal < 1 and options.dtype == "float32":
        raise BenchError(
            f"{case.name}: the sides' answers differ ({equal:.0%} of {len(programs)} programs agree), though all of "
            "them take the likeliest token in float32. What they do cannot be compared; this is a bug of Macaw."
        )
    return checked, equal


def _run_round(
    case: Case,
    i: int,
    sides: Sequence[Side],
    options: BenchOptions,
    on_side: Callable[[Side, Case, int, list[ProgramSpec]], Run],
) -> dict[Side, Run]:
    """A few programs to warm up and to compare the answers, then all of them; who goes first changes by round."""
    programs = [
        _faster(spec, options.speed) for spec in make_workload(case.workload, replace(options.options, rate=case.rate))
    ]
    _check(case, sides, options, on_side, [_at_once(spec) for spec in programs[:NUM_CHECKED]])
    return {side: on_side(side, case, i, programs) for side in _rotated(sides, i)}


def _case_result(case: Case, sides: Sequence[Side], rounds: dict[str, list[Run]]) -> CaseResult:
    own = [rounds[side.name] for side in sides if side.url is None]
    equal = statistics.fmean(_share_equal(runs) for runs in zip(*own, strict=True))
    return CaseResult(case.workload, case.name, rounds, equal, case.series, case.rate)


def _at_once(spec: ProgramSpec) -> ProgramSpec:
    """Without waiting for arrivals, and hardly for tools."""
    calls = tuple(replace(call, gap_s=min(call.gap_s, _CHECKED_GAP_S)) for call in spec.calls)
    return replace(spec, arrival_s=0.0, calls=calls)


def _rotated(sides: Sequence[Side], i: int) -> list[Side]:
    return [*sides[i % len(sides) :], *sides[: i % len(sides)]]


def _faster(spec: ProgramSpec, speed: float) -> ProgramSpec:
    calls = tuple(replace(call, gap_s=call.gap_s / speed) for call in spec.calls)
    deadline_s = None if spec.deadline_s is None else spec.deadline_s / speed
    return replace(spec, arrival_s=spec.arrival_s / speed, calls=calls, deadline_s=deadline_s)


def _share_equal(runs: Sequence[Run]) -> float:
    """Of the programs whose answers are the same on all sides."""
    programs = zip(*(run.outcomes for run in runs), strict=True)
    return statistics.fmean(len({str(outcome.answers) for outcome in same}) == 1 for same in programs)


async def _run(client: WorkloadClient, programs: Sequence[ProgramSpec], *, timeline: bool) -> Run:
    async with client:
        return await client.run(programs, timeline=timeline)


async def _probe(client: WorkloadClient, programs: Sequence[ProgramSpec], rate: float, search: SearchOptions) -> Probe:
    async with client:
        return await probe(client, programs, rate, search.slo)


def _seconds(options: BenchOptions) -> float:
    """Of all rounds of one side's search, at most."""
    assert options.search is not None
    return sum(map(options.search.budget_s, range(options.num_rounds)))


def _limit_s(case: Case, search: SearchOptions, options: BenchOptions) -> float:
    """Of one side's search in all rounds, at most."""
    programs = programs_at(case.workload, options.options, search, search.floor, 0, "")
    return search.limit_s(options.num_rounds, max(map(search.slo.allowed_s, programs)))


class _Model(NamedTuple):
    """Its name, and whether it takes chats."""

    name: str
    chat: bool


def _model(url: str, api_key: str) -> _Model:
    """The first model that a server lists; who does not say takes chats."""
    try:
        response = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {api_key}"})
        response.raise_for_status()
        model = response.json()["data"][0]
        return _Model(str(model["id"]), bool(model.get("has_chat_template", True)))
    except (httpx.HTTPError, ValueError, LookupError) as e:
        raise BenchError(
            f"{url}/v1/models does not list a model ({type(e).__name__}: {e}). "
            "Give the URL of a running OpenAI-compatible server as --peer."
        ) from e


def _progress(console: Console, *, timed: bool) -> Progress:
    """A bar; `timed`: its total is the seconds that it may take."""
    columns = (TextColumn("{task.description}"), BarColumn(), *(() if timed else (MofNCompleteColumn(),)))
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
