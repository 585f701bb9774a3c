"""The commands of `macaw trace`; what they need is loaded when they run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from macaw_server.traces.lines import Totals

trace = typer.Typer(
    name="trace", no_args_is_help=True, help="Record what a live server does, without its texts, and do it again."
)

Url = Annotated[str | None, typer.Option(help="Of the server; default: MACAW_BASE_URL, or this machine's port 8000.")]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option("--api-key", metavar="KEY", help="Repeat for several tenants; default: MACAW_API_KEY."),
]
Tenants = Annotated[
    Path | None, typer.Option(metavar="FILE", help="All tenants of this TOML file, which is the server's.")
]


@trace.command()
def record(
    url: Url = None,
    api_key: ApiKeys = None,
    tenants: Tenants = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Default: until Ctrl-C.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The trace.")] = Path("trace.jsonl"),
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of a block, from 16; default: the server's page, in which it shares.")
    ] = None,
) -> None:
    """Write the calls that run meanwhile as a trace: lengths, times, who waits for whom, and what is shared."""
    import asyncio
    import signal

    from macaw import MacawError
    from macaw_server.errors import ConfigError
    from macaw_server.traces.record import RecordError, RecordOptions
    from macaw_server.traces.record import record as run

    console = Console(stderr=True, highlight=False, soft_wrap=True)

    async def main() -> Totals:
        interrupted = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, interrupted.set)

        async def stop() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await interrupted.wait()

        def on_started(root: str) -> None:
            until = "until Ctrl-C" if seconds is None else f"for {seconds:g} s"
            console.print(f"recording {escape(root)} {until}")

        return await run(RecordOptions(url, _keys(api_key, tenants), out, block_size), stop, on_started)

    try:
        totals = asyncio.run(main())
    except (RecordError, MacawError, ConfigError, ValueError, OSError) as e:
        raise _failed(e) from e
    if not totals.num_calls:
        raise _failed(RecordError(f"No call ended meanwhile, so {out} is empty. Record while something runs."))
    console.print(f"{escape(str(out))}: {_told(totals)}")


@trace.command()
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace: recorded, from simulate, or Mooncake's.")],
    url: Url = None,
    api_key: ApiKeys = None,
    tenants: Tenants = None,
    way: Annotated[
        Literal["programs", "requests"], typer.Option(help="Whole graphs, or each call by itself when it is ready.")
    ] = "programs",
    speed: Annotated[float, typer.Option(help="Arrivals and the client's gaps are so many times faster.")] = 1.0,
    model: Annotated[str | None, typer.Option(help="Its vocabulary makes the texts; default: the served one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the texts; default: a new one, so that cold is cold.")] = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything there is here.")] = None,
) -> None:
    """Send programs of the same shapes, lengths and shared beginnings at the same times; the table of macaw bench."""
    import secrets

    from macaw_server.bench.errors import BenchError
    from macaw_server.errors import StartupError
    from macaw_server.traces.replay import ReplayOptions
    from macaw_server.traces.replay import replay as run

    try:
        if speed <= 0:
            raise BenchError(f"--speed {speed:g} was given; it must be above 0.")
        seed = secrets.randbelow(2**31) if seed is None else seed
        url = url or os.environ.get("MACAW_BASE_URL") or "http://127.0.0.1:8000"
        result = run(ReplayOptions(file, url, _keys(api_key, tenants), way, speed, model, seed))
    except (BenchError, StartupError, ValueError, OSError) as e:
        raise _failed(e) from e
    result.print(Console(highlight=False))
    if out is not None:
        out.write_text(result.report.as_json(), encoding="utf-8")
    if result.failures:
        raise typer.Exit(1)


def _told(totals: Totals) -> str:
    words = [
        f"{totals.num_programs:,} programs",
        f"{totals.num_calls:,} calls",
        f"{totals.prompt_tokens:,} prompt tokens ({totals.cached_tokens / max(1, totals.prompt_tokens):.1%} cached)",
        f"{totals.output_tokens:,} output tokens",
    ]
    if totals.num_cut:
        words.append(f"{totals.num_cut:,} calls failed or were cancelled, and are there as far as they came")
    if totals.num_lost:
        words.append(
            f"[yellow]{totals.num_lost:,} calls are missing, for they came faster than they could be written[/]"
        )
    return ", ".join(words)


def _keys(api_keys: list[str] | None, tenants: Path | None) -> list[str]:
    """One key of each tenant."""
    keys = list(api_keys or [])
    if tenants is None:
        return keys or [key for key in [os.environ.get("MACAW_API_KEY")] if key]
    from macaw_server.service.tenants import read_tenants

    return [*keys, *(tenant.keys[0] for tenant in read_tenants(tenants))]


def _failed(error: Exception) -> typer.Exit:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/] {escape(str(error))}")
    return typer.Exit(1)
