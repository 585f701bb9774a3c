"""`macaw bench chain-summary|map-reduce|...|all`: one command for each workload."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

WORKLOADS = {
    "chain-summary": "A document refined chunk by chunk: each call reads the answer before it.",
    "map-reduce": "Summaries of all chunks, then one of the summaries.",
    "copilot": "Independent requests behind one long system prompt.",
    "gpts": "Four apps, each with a prefix that its users share.",
    "multi-agent": "An architect, coders, reviewers and revisers of several files.",
    "mixed": "Chats beside map-reduce programs.",
    "agents": "Loops of turns with tools in between.",
    "all": "All seven workloads.",
}


_NUMBERS = re.compile(r"\d+(\.\d+)?(,\d+(\.\d+)?)*")


def _numbers(text: str) -> tuple[float, ...]:
    if not _NUMBERS.fullmatch(text):
        raise typer.BadParameter(f"{text!r} was given; numbers with commas are accepted, such as 0,50,250.")
    return tuple(float(number) for number in text.split(","))


def _rates(text: str) -> tuple[float, ...] | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not _NUMBERS.fullmatch(text):
        raise typer.BadParameter(
            f"{text!r} was given; programs per second with commas are accepted, such as 1,2,4, or auto."
        )
    return _numbers(text)


def register(app: typer.Typer) -> None:
    """Add a command for each workload to `app`."""
    for name, text in WORKLOADS.items():
        app.command(name, help=f"{text} Plain requests against programs, on real servers in alternation.")(
            _command(list(WORKLOADS)[:-1] if name == "all" else [name])
        )


def _command(workloads: list[str]) -> Any:
    def bench_workload(
        serve_flags: Annotated[
            list[str] | None, typer.Argument(metavar="[-- FLAGS]", help="For every macaw serve that is started.")
        ] = None,
        model: Annotated[str, typer.Option(help="Local folder, hub name, or macaw-demo.")] = "macaw-demo",
        dtype: Annotated[str, typer.Option(help="Of the model, on all sides.")] = "float32",
        scale: Annotated[float, typer.Option(help="Factor of all lengths.")] = 0.05,
        programs: Annotated[
            int | None,
            typer.Option(min=1, help="Of the first kind; default: the workload's; with --rate auto: 20 at least."),
        ] = None,
        rate: Annotated[
            Any,
            typer.Option(
                parser=_rates,
                metavar="R,R|auto",
                help="Programs per second; several: rising load; auto: find the highest that each side sustains.",
            ),
        ] = None,
        speed: Annotated[
            float, typer.Option(help="Arrivals and the client's own gaps are so many times faster.")
        ] = 1.0,
        background: Annotated[float, typer.Option(min=0, help="Chats per second on top.")] = 0.0,
        rtt_ms: Annotated[
            Any, typer.Option("--rtt-ms", parser=_numbers, metavar="MS,MS", help="Round trips of the network.")
        ] = "50",
        peer: Annotated[
            str | None, typer.Option(metavar="URL", help="Another OpenAI-compatible server of the same model.")
        ] = None,
        ablate: Annotated[
            str | None,
            typer.Option(metavar="SWITCH,...", help="Also Macaw without these: all, or names; a wrong one lists them."),
        ] = None,
        baseline: Annotated[
            str,
            typer.Option(
                metavar="NAME,...",
                help="requests: with prefix caching; uncached: without; gains are over the first one.",
            ),
        ] = "requests",
        repeat: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
        slo_ms: Annotated[
            float | None, typer.Option("--slo-ms", help="Allowed latency per output token of a program: goodput.")
        ] = None,
        slo_share: Annotated[
            float, typer.Option(help="With --rate auto: share of programs within --slo-ms at a rate that is sustained.")
        ] = 0.9,
        probe_s: Annotated[
            float, typer.Option("--probe-s", help="With --rate auto: seconds of arrivals at each rate that is tried.")
        ] = 20.0,
        seed: Annotated[int, typer.Option(help="Of the programs and their texts.")] = 0,
        out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write JSON, Markdown and pictures here.")] = None,
    ) -> None:
        from macaw_server.bench.errors import BenchError
        from macaw_server.bench.workload.pictures import check_matplotlib, write_pictures
        from macaw_server.bench.workload.probe import Slo
        from macaw_server.bench.workload.run import BenchOptions, run
        from macaw_server.bench.workload.sustain import SearchOptions
        from macaw_server.errors import StartupError
        from macaw_server.workloads import WorkloadOptions

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        try:
            if speed <= 0:
                raise BenchError(f"--speed {speed:g} was given; it must be above 0.")
            if slo_ms is not None and slo_ms <= 0:
                raise BenchError(f"--slo-ms {slo_ms:g} was given; it must be above 0.")
            search = None
            if rate == "auto":
                if slo_ms is None:
                    raise BenchError(
                        "--rate auto needs --slo-ms, the allowed latency per output token of a program: some times "
                        "what ms/token says in a run at low load, such as --rate 0.1 --programs 5."
                    )
                search = SearchOptions(Slo(slo_ms, slo_share), probe_s, programs or 20, speed)
            if out is not None:
                check_matplotlib()
                out.mkdir(parents=True, exist_ok=True)
            report = run(
                BenchOptions(
                    workloads=workloads,
                    options=WorkloadOptions(seed=seed, scale=scale, num_programs=programs, background=background),
                    rates=(None,) if search else rate or (None,),
                    speed=speed,
                    rtts_ms=rtt_ms,
                    model=model,
                    dtype=dtype,
                    serve_flags=serve_flags or [],
                    peer=peer,
                    ablate=ablate.split(",") if ablate else (),
                    baselines=baseline.split(","),
                    num_rounds=repeat,
                    slo_token_ms=slo_ms,
                    search=search,
                ),
                console,
            )
            report.print(Console(highlight=False))
            if out is not None:
                (out / "results.json").write_text(report.as_json(), encoding="utf-8")
                (out / "results.md").write_text(report.as_markdown(), encoding="utf-8")
                write_pictures(report, out)
        except (BenchError, StartupError, OSError, ValueError) as e:
            console.print(f"[red]error:[/] {escape(str(e))}")
            raise typer.Exit(1) from e

    return bench_workload
