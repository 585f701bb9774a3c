"""`macaw trace replay`: the programs of a trace on a live server, and what is told of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from macaw import MacawClient, MacawError
from macaw_server.bench.errors import BenchError
from macaw_server.bench.facts import command, commit
from macaw_server.bench.workload.clients import Way
from macaw_server.bench.workload.records import Run
from macaw_server.bench.workload.report import CaseResult, WorkloadReport, print_whole
from macaw_server.bench.workload.texts import Texts
from macaw_server.config import EngineConfig
from macaw_server.models.loader import load_tokenizer
from macaw_server.traces.client import ReplayClient, prompt_overhead
from macaw_server.workloads import ProgramSpec, read_trace


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """As the command's help says.

    Attributes:
        file: The trace.
        url: Of the server.
        api_keys: The trace's tenants get them in turn; without any all are one.
        way: How applications are sent.
        speed: Arrivals and gaps are so many times faster; deadlines stay.
        model: Whose vocabulary makes the texts; None is the served one.
        seed: Of the texts.
    """

    file: Path
    url: str
    api_keys: Sequence[str]
    way: Way
    speed: float
    model: str | None
    seed: int


class Replay(NamedTuple):
    """What has happened.

    Attributes:
        report: Of the programs that were answered.
        failures: Messages of the others, with how many had each.
        asked: Tokens of prompts and answers in the trace, of the programs that were answered.
        seen: The same, by the server's account, and of the prompts' the cached ones.
    """

    report: WorkloadReport
    failures: Counter[str]
    asked: tuple[int, int]
    seen: tuple[int, int, int]

    def print(self, console: Console) -> None:
        """The table of `macaw bench`, and what the trace's tokens have become."""
        [result] = self.report.results
        table = Table(title=result.name)
        for i, column in enumerate(self.report.columns):
            table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
        for summary in self.report.summaries[result.name]:
            table.add_row(*self.report.cells(summary))
        print_whole(console, table)
        (prompt, output), (seen_prompt, seen_cached, seen_output) = self.asked, self.seen
        facts = {
            "prompts": f"{seen_prompt:,} tokens, {seen_cached:,} of them cached; in the trace {prompt:,}",
            "answers": f"{seen_output:,} tokens; in the trace {output:,}",
            **self.report.facts,
        }
        for name, value in facts.items():
            console.print(f"{name:8} {value}", markup=False, soft_wrap=True)
        for message, count in self.failures.most_common(3):
            console.print(f"failed   {count} programs, such as: {message}", markup=False, soft_wrap=True)


def replay(options: ReplayOptions) -> Replay:
    """Run the programs of a trace, each when its time has come.

    Raises:
        BenchError: The server cannot be reached, or none of the programs was answered.
        TraceError: The file is no trace.
        StartupError: There is no tokenizer of that name.
        OSError: The file cannot be read.
    """
    specs = [_faster(spec, options.speed) for spec in read_trace(options.file)]
    url = options.url.rstrip("/").removesuffix("/v1")
    served = _served_model(url, next(iter(options.api_keys), None))
    # The weights are not read.
    tokenizer = load_tokenizer(EngineConfig(model=options.model or served, load_format="dummy"))
    texts = Texts(tokenizer, options.seed)
    overhead = prompt_overhead(texts, tokenizer)
    keys: Sequence[str | None] = options.api_keys or [None]
    tenants = list(dict.fromkeys(spec.tenant for spec in specs))
    clients: list[tuple[ReplayClient, list[ProgramSpec]]] = []
    for i, key in enumerate(keys[: len(tenants)]):
        own = [spec for spec in specs if tenants.index(spec.tenant) % len(keys) == i]
        client = ReplayClient(url=url, model=served, api_key=key, way=options.way, texts=texts, overhead=overhead)
        clients.append((client, own))
    outcomes = [outcome for run in asyncio.run(_run_all(clients)) for outcome in run.outcomes]
    failures = Counter(message for client, _ in clients for message in client.failures.values())
    if not outcomes:
        raise BenchError(f"None of the {len(specs)} programs was answered. {next(iter(failures))}")
    outcomes.sort(key=lambda outcome: outcome.spec.arrival_s)
    name = f"{options.file.name} as {options.way} on {url}, {options.speed:g}x as fast"
    facts = {"command": command(options.api_keys), "commit": commit()}
    report = WorkloadReport([CaseResult("trace", name, {options.way: [Run(outcomes)]}, 1.0)], facts)
    answered = [outcome.spec for outcome in outcomes]
    return Replay(
        report,
        failures,
        (
            sum(sum(spec.prompt_lens().values()) for spec in answered),
            sum(call.output_len for spec in answered for call in spec.calls),
        ),
        (
            sum(outcome.prompt_tokens for outcome in outcomes),
            sum(outcome.cached_tokens for outcome in outcomes),
            sum(outcome.output_tokens for outcome in outcomes),
        ),
    )


async def _run_all(clients: Sequence[tuple[ReplayClient, list[ProgramSpec]]]) -> list[Run]:
    return await asyncio.gather(*(_run(client, programs) for client, programs in clients))


async def _run(client: ReplayClient, programs: Sequence[ProgramSpec]) -> Run:
    async with client:
        return await client.run(programs)


def _served_model(url: str, api_key: str | None) -> str:
    """The first model that the server lists."""
    try:
        with MacawClient(url, api_key) as client:
            return client.models()[0]
    except (MacawError, ValueError, LookupError) as e:
        raise BenchError(f"{url}/v1/models does not list a model: {e}") from e


def _faster(spec: ProgramSpec, speed: float) -> ProgramSpec:
    calls = tuple(replace(call, gap_s=call.gap_s / speed) for call in spec.calls)
    return replace(spec, arrival_s=spec.arrival_s / speed, calls=calls)
