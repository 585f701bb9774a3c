"""The commands of `macaw simulate`; what they need is loaded when they run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

if TYPE_CHECKING:
    from macaw_server.config import EngineConfig
    from macaw_server.engine.core import EngineCore


class _RunIsDefault(TyperGroup):
    """A first word that is no command is a workload or a trace for `run`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command, its name and the rest."""
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


simulate = typer.Typer(
    name="simulate",
    cls=_RunIsDefault,
    no_args_is_help=True,
    help="Run workloads on the server's own scheduling with a virtual clock: macaw simulate WORKLOAD|TRACE.",
)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = (0.0,)
    if min(numbers) <= 0:
        raise typer.BadParameter(f"{text!r} was given; numbers above 0 with commas are accepted, such as 10,1.")
    return numbers


def _counts(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise typer.BadParameter(f"{text!r} was given; whole numbers from 1 with commas are accepted, such as 10,1000.")
    return tuple(int(number) for number in text.split(","))


Policies = Annotated[str, typer.Option("--policy", help="Scheduling policies, with commas: each gets a column.")]
Seed = Annotated[int, typer.Option(help="The same seed is the same workload.")]
Scale = Annotated[float, typer.Option(help="Factor of all lengths.")]
Programs = Annotated[int | None, typer.Option(min=1, help="Of the workload's first stream; default: its own.")]
Rate = Annotated[float | None, typer.Option(min=0, help="Programs per second, Poisson; 0: all at once.")]
Background = Annotated[float, typer.Option(min=0, help="Chats per second on top.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write everything there is here.")]


@simulate.command()
def run(
    what: Annotated[str, typer.Argument(metavar="WORKLOAD|TRACE", help="Name of a workload, or a JSONL file.")],
    policy: Policies = "fcfs,app",
    engines: Annotated[int, typer.Option(min=1, help="Equal engines behind one server.")] = 1,
    seed: Seed = 0,
    scale: Scale = 1.0,
    programs: Programs = None,
    rate: Rate = None,
    background: Background = 0.0,
    tenants: Annotated[Any, typer.Option(parser=_numbers, metavar="SHARE,SHARE", help="Share of each tenant.")] = "1",
    client: Annotated[str, typer.Option(help="programs, or requests: each call by itself.")] = "programs",
    rtt_ms: Annotated[float, typer.Option(min=0, help="Round trip between client and server.")] = 0.0,
    slo: Annotated[float, typer.Option(min=1, help="Slowdown allowed to a program without a deadline.")] = 5.0,
    step_time: Annotated[Path | None, typer.Option(help="From `macaw simulate fit`; default: a small CPU.")] = None,
    kv_pages: Annotated[int | None, typer.Option(min=2, help="Pages of one engine.")] = None,
    page_size: Annotated[int | None, typer.Option(min=1, help="Tokens per page.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Sequences in one batch.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="Token budget of one step.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Prompt plus output, in tokens.")] = None,
    latency_slowdown: Annotated[float | None, typer.Option(min=1, help="As for macaw serve.")] = None,
    eviction: Annotated[Literal["value", "lru"], typer.Option(help="As for macaw serve.")] = "value",
    prefix_caching: Annotated[bool, typer.Option(help="As for macaw serve.")] = True,
    single_flight: Annotated[bool, typer.Option(help="As for macaw serve.")] = True,
    task_groups: Annotated[bool, typer.Option(help="As for macaw serve.")] = True,
    placement: Annotated[
        Literal["affinity", "least-loaded"], typer.Option(help="As for macaw serve; with --engines.")
    ] = "affinity",
    write_trace: Annotated[Path | None, typer.Option(help="Write the workload as a trace here.")] = None,
    json_file: Json = None,
) -> None:
    """Run a workload or a trace on a virtual clock, once for each policy."""
    from macaw_server.simulate import run as runs
    from macaw_server.workloads import WorkloadOptions

    limits = {
        "num_pages": kv_pages,
        "page_size": page_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "latency_slowdown": latency_slowdown,
        "eviction": eviction,
        "prefix_caching": prefix_caching,
        "single_flight": single_flight,
        "task_groups": task_groups,
        "placement": placement,
    }
    try:
        options = WorkloadOptions(seed, scale, programs, rate, background, tenants)
        text = runs.run(
            what,
            options,
            policies=policy.split(","),
            limits={name: value for name, value in limits.items() if value is not None},
            num_engines=engines,
            client=client,
            rtt_s=rtt_ms / 1000,
            slo=slo,
            step_time=step_time,
            write_trace_to=write_trace,
            console=Console(highlight=False),
        )
    except (ValueError, OSError, runs.StartupError) as e:
        raise _failed(e) from e
    if json_file is not None:
        json_file.write_text(text, encoding="utf-8")


Model = Annotated[str, typer.Option(help="Local folder, hub name, or macaw-demo.")]
EngineFlags = Annotated[list[str] | None, typer.Argument(metavar="[-- FLAGS]", help="As for macaw serve.")]


@simulate.command()
def fit(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    model: Model = "macaw-demo",
    seconds: Annotated[float, typer.Option(min=0, help="To measure for.")] = 60.0,
    max_prompt_len: Annotated[int, typer.Option(min=16, help="Longest prompt.")] = 2048,
    flags: EngineFlags = None,
) -> None:
    """Measure how long the steps of a real engine take, and write that to a file."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    engine, core = _load(model, flags, console)
    from macaw_server.simulate.fit import fit as measure

    found = measure(core, engine, seconds=seconds, max_prompt_len=max_prompt_len, on_progress=console.print)
    found.save(out)
    for name, value in found.step_time.coefficients._asdict().items():
        typer.echo(f"{name:9} {value:.4g} ms")
    typer.echo(f"mean error of a step {found.step_time.error:.1%} over {found.step_time.num_observed} steps; {out}")


@simulate.command()
def check(
    workloads: Annotated[str, typer.Option(help="With commas.")] = "map-reduce,copilot,multi-agent",
    model: Model = "macaw-demo",
    step_time: Annotated[Path | None, typer.Option(help="From `macaw simulate fit`; default: fit first.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="To fit for.")] = 30.0,
    scale: Scale = 0.1,
    seed: Seed = 0,
    programs: Programs = None,
    rate: Rate = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each workload.")] = 3,
    json_file: Json = None,
    flags: EngineFlags = None,
) -> None:
    """Run workloads on a real engine and on the simulator: the error of the programs' latencies."""
    import json
    from dataclasses import asdict

    from macaw_server.scheduler import StepTimeModel
    from macaw_server.simulate.check import check as hold_against
    from macaw_server.simulate.fit import fit as measure
    from macaw_server.simulate.model_file import ModelFile, ModelFileError
    from macaw_server.workloads import WorkloadOptions

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    engine, core = _load(model, flags, console)
    try:
        fitted = ModelFile.load(step_time) if step_time else measure(core, engine, seconds=seconds)
        # A copy: the engine goes on learning from what it is checked on.
        frozen = StepTimeModel.from_dict(fitted.step_time.to_dict())
        options = WorkloadOptions(seed, scale, programs, rate)
        found = hold_against(
            core, engine, frozen, workloads.split(","), options, num_rounds=rounds, on_progress=console.print
        )
    except (ValueError, ModelFileError) as e:
        raise _failed(e) from e
    typer.echo(f"{'workload':14} programs  calls   real s    sim s  |error| p50    p90    bias")
    for each in found:
        typer.echo(
            f"{each.workload:14} {each.num_programs:8} {each.num_calls:6} {each.real_s:8.3f} {each.simulated_s:8.3f}"
            f"  {each.error:11.1%} {each.worst_decile:6.1%} {each.bias:+7.1%}"
        )
    if json_file is not None:
        content = {"step_time": frozen.to_dict(), "workloads": [asdict(each) for each in found]}
        json_file.write_text(json.dumps(content, indent=1), encoding="utf-8")


@simulate.command()
def cost(
    waiting: Annotated[Any, typer.Option(parser=_counts, metavar="N,N", help="Calls that wait.")] = "10,1000,100000",
    policy: Policies = "fcfs,app",
    json_file: Json = None,
) -> None:
    """What scheduling costs per call, by the number of calls that wait."""
    import json
    from dataclasses import asdict

    from macaw_server.simulate.cost import decision_cost

    try:
        found = [decision_cost(name, num_waiting) for name in policy.split(",") for num_waiting in waiting]
    except ValueError as e:
        raise _failed(e) from e
    typer.echo("policy     waiting  us/call  us/step    steps")
    for each in found:
        typer.echo(
            f"{each.policy:8} {each.num_waiting:9,} {each.us_per_call:8.1f} {each.us_per_step:8.1f} {each.num_steps:8,}"
        )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(each) for each in found], indent=1), encoding="utf-8")


def _load(model: str, flags: list[str] | None, console: Console) -> tuple[EngineConfig, EngineCore]:
    """A real engine in this process."""
    from macaw_server.config import EngineConfig
    from macaw_server.engine.core import EngineCore
    from macaw_server.errors import StartupError

    try:
        engine = EngineConfig(model=model, **_flags(flags or []))
        return engine, EngineCore(engine, on_loading=console.print)
    except (StartupError, ValueError) as e:
        raise _failed(e) from e


def _flags(words: list[str]) -> dict[str, Any]:
    """``--max-num-seqs 8 --dtype float32`` as fields; values are parsed by the configuration."""
    import json

    fields: dict[str, Any] = {}
    pairs = iter(words)
    for word in pairs:
        name, has_value, value = word.partition("=")
        if not name.startswith("--"):
            raise typer.BadParameter(f"{word!r} was given after --; flags of macaw serve are accepted.")
        value = value if has_value else next(pairs, "")
        try:
            fields[name[2:].replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            fields[name[2:].replace("-", "_")] = value
    return fields


def _failed(error: Exception) -> typer.Exit:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/] {escape(str(error))}")
    return typer.Exit(1)
