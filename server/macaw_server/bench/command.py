"""The commands of `macaw bench`; what they need is loaded when they run."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from macaw_server.bench.workload.command import register

bench = typer.Typer(name="bench", no_args_is_help=True, help="Measure Macaw against another server, and the machine.")


register(bench)


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise typer.BadParameter(f"{text!r} was given; whole numbers from 1 with commas are accepted, such as 1,8,32.")
    return tuple(int(number) for number in text.split(","))


def _ids(text: str) -> range:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise typer.BadParameter(f"{text!r} was given; FIRST:END is accepted, such as 1000:2000 (2000 is left out).")
    return range(int(found[1]), int(found[2]))


@bench.command()
def engine(
    peer: Annotated[str, typer.Option(metavar="URL", help="OpenAI-compatible server to compare with.")],
    url: Annotated[str | None, typer.Option(metavar="URL", help="A running Macaw; without it one is started.")] = None,
    model: Annotated[str | None, typer.Option(help="What both serve: to start Macaw, and for the limit.")] = None,
    serve_flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- FLAGS]", help="For the macaw serve that is started.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the model, on both sides.")] = "bfloat16",
    concurrency: Annotated[Any, typer.Option(parser=_numbers, metavar="N,N", help="Requests at once.")] = "1,8,32",
    prefix: Annotated[int, typer.Option(min=1, help="Prompt tokens that are shared, or could be.")] = 1000,
    own: Annotated[int, typer.Option(min=1, help="Prompt tokens behind these, different in every request.")] = 64,
    out: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    cases: Annotated[str, typer.Option(help="Only these: names or patterns (shared-*-warm), with commas.")] = "*",
    rounds: Annotated[int, typer.Option(min=1, help="Bursts per case and side.")] = 3,
    ids: Annotated[Any, typer.Option(parser=_ids, metavar="FIRST:END", help="Tokens of the prompts.")] = "1000:2000",
    seed: Annotated[int | None, typer.Option(help="Of the prompts; default: a new one, so that cold is cold.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Of the Macaw at --url.")] = None,
    peer_api_key: Annotated[str | None, typer.Option(help="Of the peer.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds without a sign of life that fail a request.")] = 1800.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything there is here.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table here.")] = None,
) -> None:
    """Bursts of equal requests on Macaw and a peer in alternation: tokens/s, latencies, ratio, share of the limit."""
    from macaw_server.bench.errors import BenchError
    from macaw_server.bench.report import TABLE_WIDTH
    from macaw_server.bench.run import Options, run
    from macaw_server.errors import StartupError

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    options = Options(
        peer=peer,
        url=url,
        model=model,
        serve_flags=serve_flags or [],
        dtype=dtype,
        concurrency=concurrency,
        prefix_len=prefix,
        own_len=own,
        output_len=out,
        patterns=cases.split(","),
        num_rounds=rounds,
        ids=ids,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        api_key=api_key,
        peer_api_key=peer_api_key,
        timeout_s=timeout,
    )
    try:
        report = run(options, console)
    except (BenchError, StartupError) as e:
        console.print(f"[red]error:[/] {escape(str(e))}")
        raise typer.Exit(1) from e
    wide = Console(highlight=False)
    wide.width = max(wide.width, TABLE_WIDTH)  # a narrower terminal wraps the lines, and no cell is cut
    report.print(wide)
    if json_file is not None:
        json_file.write_text(report.as_json(), encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(report.as_markdown(), encoding="utf-8")
