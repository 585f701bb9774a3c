"""``macaw demo``: one unchanged map-reduce chain over a document, run three ways, with what each of them cost."""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx
import typer
from langchain_core.callbacks import get_usage_metadata_callback
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from langchain_text_splitters import RecursiveCharacterTextSplitter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from langchain_macaw.chat_models import ChatMacaw
from langchain_macaw.compile import compile
from macaw.client import MacawClient
from macaw.protocol import ProgramState
from macaw.timeline import render_timeline

MODEL = "macaw-demo"
ROUND_TRIP_S = 0.05
NOTES = Path(__file__).with_name("demo_notes.txt")
CHUNK_CHARACTERS, OVERLAP_CHARACTERS, MAX_CHUNKS = 320, 40, 24
MAP_TOKENS, REDUCE_TOKENS = 56, 128
START_TIMEOUT_S = 300.0

INSTRUCTIONS = (
    "You summarise notes for people who have no time to read them. You are given one part of a longer document at a "
    "time. Say in one sentence what this part is about, and how it ended. Keep numbers, names of people and names of "
    "places exactly as they are written. Leave out greetings, opinions, and anything that the part does not say. If "
    "something has gone wrong, say why. If the part is about several things, name them all. Write plain text without "
    "headings."
)


class DemoError(Exception):
    """The demo cannot run; the message says why and what to do."""


class RoundTrip(httpx.HTTPTransport):
    """A network that is `seconds` away: every request waits that long before it is sent, and is counted."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.num_requests = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send after the wait."""
        self.num_requests += 1
        time.sleep(self.seconds)
        return super().handle_request(request)


class Way(NamedTuple):
    """One way of running the chain.

    Attributes:
        name: For the table.
        tenant: API key; tenants share no cache, so each starts cold.
        compiled: Whether the chain goes through `compile`.
    """

    name: str
    tenant: str
    compiled: bool


@dataclass(frozen=True, slots=True)
class Result:
    """What one run gave and cost; `program` only where it was compiled."""

    way: Way
    answer: str
    num_requests: int
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    program: ProgramState | None


def demo(
    doc: Annotated[Path | None, typer.Option(help="Text to summarise; default: two dozen short notes.")] = None,
) -> None:
    """Run a map-reduce chain over a document: plain, compiled, and compiled again on a warm cache."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        name, text = _read(doc)
        run_demo(name, text, console)
    except DemoError as e:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/] {escape(str(e))}")
        raise typer.Exit(1) from e


def run_demo(name: str, text: str, console: Console) -> list[Result]:
    """Run all ways on a server of their own and print what they cost.

    Raises:
        DemoError: The server does not start, or the answers do not agree.
    """
    splitter = RecursiveCharacterTextSplitter(chunk_size=CHUNK_CHARACTERS, chunk_overlap=OVERLAP_CHARACTERS)
    chunks = [{"text": chunk} for chunk in splitter.split_text(text)[:MAX_CHUNKS]]
    if not chunks:
        raise DemoError(f"{name} has no text. Give a file with some as --doc (make demo DOC=path).")
    used = sum(len(chunk["text"]) for chunk in chunks)
    cut = f" (the first {used:,} of {len(text):,} characters)" if used < 0.9 * len(text) else ""
    console.print(f"Document: {escape(name)}, {len(chunks)} chunks{cut}. Chain: {len(chunks)} maps -> 1 reduce.")
    console.print(f"Model: {MODEL}, which is tiny and has learnt to summarise [yellow]notes of this kind[/] only.")
    ways = [
        Way("plain", secrets.token_hex(8), compiled=False),
        Way("compiled", tenant := secrets.token_hex(8), compiled=True),
        Way("compiled, warm", tenant, compiled=True),
        Way("warm-up", secrets.token_hex(8), compiled=True),
    ]
    with console.status("starting a server"), _server([way.tenant for way in ways]) as url:
        _run(ways[3], url, chunks[:2])  # first-time costs of client and server are not what is compared
        results = []
        for way in ways[:3]:
            with console.status(f"running: {way.name}"):
                results.append(_run(way, url, chunks))
    _report(results, console)
    if len({result.answer for result in results}) > 1:
        raise DemoError("The answers do not agree:\n" + "\n".join(f"{r.way.name}: {r.answer!r}" for r in results))
    if (program := results[1].program) is not None:
        console.print("Three of the summaries:")
        for call in program.calls[:3]:
            console.print(escape(f"- {program.variables[call.output]}"))
    console.print(f"The {len(results)} answers agree:\n{escape(results[0].answer)}")
    return results


def build_chain(llm: ChatMacaw) -> Runnable[Any, str]:
    """The chain, as any LangChain user would write it: summarise each part, then combine the summaries."""
    summarise = (
        ChatPromptTemplate.from_messages([("system", INSTRUCTIONS), ("human", "Summarise this part:\n\n{text}")])
        | llm.bind(max_tokens=MAP_TOKENS)
        | StrOutputParser()
    )
    combine = ChatPromptTemplate.from_messages(
        [("human", "Combine these summaries into one:\n\n{{#summaries}}- {{{.}}}\n{{/summaries}}")],
        template_format="mustache",
    )
    return {"summaries": summarise.map()} | combine | llm.bind(max_tokens=REDUCE_TOKENS) | StrOutputParser()


def _run(way: Way, url: str, chunks: list[dict[str, str]]) -> Result:
    network = RoundTrip(ROUND_TRIP_S)
    with (
        httpx.Client(transport=network, timeout=START_TIMEOUT_S) as http,
        MacawClient(url, way.tenant) as observer,
    ):
        llm = ChatMacaw(model_name=MODEL, base_url=f"{url}/v1", api_key=way.tenant, temperature=0, http_client=http)
        chain = build_chain(llm)
        with get_usage_metadata_callback() as usage:
            start = time.perf_counter()
            answer = (compile(chain) if way.compiled else chain).invoke(chunks)
            seconds = time.perf_counter() - start
        programs = observer.list_programs() if way.compiled else [None]
    spent = usage.usage_metadata[MODEL]
    cached = spent.get("input_token_details", {}).get("cache_read", 0)
    return Result(way, answer, network.num_requests, seconds, spent["input_tokens"], cached, programs[-1])


def _report(results: list[Result], console: Console) -> None:
    table = Table(title=f"\nThe same chain, {ROUND_TRIP_S * 1000:.0f} ms away from the server")
    table.add_column("", no_wrap=True)
    for column in ("requests", "seconds", "faster", "prompt\ntokens", "cached\ntokens", "computed\ntokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.way.name,
            str(result.num_requests),
            f"{result.seconds:.2f}",
            f"{results[0].seconds / result.seconds:.1f}x",
            f"{result.prompt_tokens:,}",
            f"{result.cached_tokens:,}",
            f"{result.prompt_tokens - result.cached_tokens:,}",
        )
    console.print(table)
    for result in results:
        if result.program is not None:
            console.print(f"\n{result.way.name}: one program, {len(result.program.calls)} calls")
            console.print(escape(render_timeline(result.program, width=min(console.width, 110))))
    console.print()


def _read(doc: Path | None) -> tuple[str, str]:
    if doc is None:
        return "two dozen short notes", NOTES.read_text(encoding="utf-8")
    try:
        return str(doc), doc.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DemoError(f"Cannot read {doc}: {e}. Give a text file in UTF-8.") from e


@contextmanager
def _server(api_keys: list[str]) -> Iterator[str]:
    """A `macaw serve` of its own on a free port; stopped in the end, come what may."""
    command = [sys.executable, "-m", "macaw_server", "serve", MODEL, "--port", "0", "--dtype", "float32"]
    for key in dict.fromkeys(api_keys):
        command += ["--api-key", key]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving at (http://\S+)/v1", line):
                yield found[1]
                return
        raise DemoError("The server did not start:\n" + "".join(lines[-10:]))
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
