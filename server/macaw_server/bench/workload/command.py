"""`macaw bench chain-summary|map-reduce|...|all`: one command for each workload."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

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


def _numbers(text: str) -> tuple[float, ...]:
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?)*", text):
        raise typer.BadParameter(f"{text!r} was given; numbers with commas are accepted, such as 0,50,250.")
    return tuple(float(number) for number in text.split(","))


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
        programs: Annotated[int | None, typer.Option(min=1, help="Of the first kind; default: the workload's.")] = None,
        rate: Annotated[
            Any, typer.Option(parser=_numbers, metavar="R,R", help="Programs per second; several: rising load.")
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
        seed: Annotated[int, typer.Option(help="Of the programs and their texts.")] = 0,
        out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write JSON, Markdown and pictures here.")] = None,
    ) -> None:
        from macaw_server.bench.errors import BenchError
        from macaw_server.bench.workload.pictures import write_pictures
        from macaw_server.bench.workload.report import TABLE_WIDTH
        from macaw_server.bench.workload.run import BenchOptions, run
        from macaw_server.errors import StartupError
        from macaw_server.workloads import WorkloadOptions

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        try:
            if speed <= 0:
                raise BenchError(f"--speed {speed:g} was given; it must be above 0.")
            report = run(
                BenchOptions(
                    workloads=workloads,
                    options=WorkloadOptions(seed=seed, scale=scale, num_programs=programs, background=background),
                    rates=rate or (None,),
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
                ),
                console,
            )
            wide = Console(highlight=False)
            wide.width = max(wide.width, TABLE_WIDTH)
            report.print(wide)
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                (out / "results.json").write_text(report.as_json(), encoding="utf-8")
                (out / "results.md").write_text(report.as_markdown(), encoding="utf-8")
                write_pictures(report, out)
        except (BenchError, StartupError, ValueError) as e:
            console.print(f"[red]error:[/] {escape(str(e))}")
            raise typer.Exit(1) from e

    return bench_workload
