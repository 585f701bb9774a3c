"""Time of LangChain chains, native against compiled, on the same engine, at several distances from it.

    python tests/bench/chains.py [--rounds 7] [--round-trips 0 50 250] [--max-tokens 16]

`macaw serve macaw-demo` runs as a process of its own, with one tenant for each way, so that neither finds what the
other one left in the cache. In every round both ways run on the same new input, in turns who goes first; their answers
must be equal. A round trip is a wait before each request. `requests` are those of one run.

(Not `langchain.py`: the folder of a script is importable, and LangChain has a package of that name.)
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable

from langchain_macaw import ChatMacaw, compile
from langchain_macaw.demo import MODEL, RoundTrip, _server

WORDS = ["parrots", "macaws", "seeds", "forests", "rivers", "nests", "feathers", "beaks", "rain", "nuts", "trees"]
TEXT = StrOutputParser()
TENANTS = ("native", "compiled")


def chat(text: str, template_format: Any = "f-string") -> ChatPromptTemplate:
    """A prompt of one message."""
    return ChatPromptTemplate.from_messages([("human", text)], template_format=template_format)


def three_stages(llm: ChatMacaw) -> Runnable[Any, Any]:
    """Draft, judge, improve."""
    first, second = chat("Draft: {text}") | llm | TEXT, chat("Judge: {draft}") | llm | TEXT
    return first | second | chat("Improve: {judgement}") | llm | TEXT


def map_reduce(llm: ChatMacaw) -> Runnable[Any, Any]:
    """A summary of each text, and one of all."""
    summaries = (chat("Sum up: {text}") | llm | TEXT).map()
    return {"all": summaries} | chat("Combine:\n{{#all}}- {{{.}}}\n{{/all}}", "mustache") | llm | TEXT


def two_stages(llm: ChatMacaw) -> Runnable[Any, Any]:
    """What `map` and `batch` run."""
    return chat("Sum up: {text}") | llm | TEXT | chat("Shorter: {long}") | llm | TEXT


class Workload(NamedTuple):
    """A chain, how it is run, and on how many texts (None: one, not a list)."""

    name: str
    build: Callable[[ChatMacaw], Runnable[Any, Any]]
    num_texts: int | None
    batch: bool = False

    def run(self, chain: Runnable[Any, Any], seed: int) -> Any:
        """The answer for new texts."""
        rng = random.Random(seed)
        texts = [{"text": " ".join(rng.choices(WORDS, k=60))} for _ in range(self.num_texts or 1)]
        if self.batch:
            return chain.batch(texts)
        return chain.invoke(texts if self.num_texts else texts[0])


WORKLOADS = [
    Workload("3-stage chain", three_stages, None),
    Workload("16-way map-reduce", map_reduce, 16),
    Workload(".map() of 2 stages, 8 texts", lambda llm: two_stages(llm).map(), 8),
    Workload("batch of 8, 3 stages", three_stages, 8, batch=True),
]


@dataclass(slots=True)
class Way:
    """Native or compiled, with its own connection.

    Attributes:
        chain: What runs.
        network: Counts requests.
        seconds: Of each round.
    """

    chain: Runnable[Any, Any]
    network: RoundTrip
    seconds: list[float] = field(default_factory=list)
    num_requests: int = 0

    def run(self, workload: Workload, seed: int) -> Any:
        """One timed run; its answer."""
        before, start = self.network.num_requests, time.perf_counter()
        answer = workload.run(self.chain, seed)
        self.seconds.append(time.perf_counter() - start)
        self.num_requests = self.network.num_requests - before
        return answer

    def __str__(self) -> str:
        low, middle, high = min(self.seconds), statistics.median(self.seconds), max(self.seconds)
        return f"{self.num_requests:4} {middle:7.3f} ({low:.3f} - {high:.3f})"


def compare(workload: Workload, url: str, round_trip_ms: float, args: argparse.Namespace) -> dict[str, Any]:
    """Run both ways in turns.

    Raises:
        SystemExit: They do not answer the same.
    """
    ways = []
    for tenant in TENANTS:
        network = RoundTrip(round_trip_ms / 1000)
        http = httpx.Client(transport=network, timeout=300)
        llm = ChatMacaw(
            model=MODEL,
            base_url=f"{url}/v1",
            api_key=tenant,
            temperature=0,
            max_tokens=args.max_tokens,
            ignore_eos=True,
            http_client=http,
        )
        chain = workload.build(llm)
        ways.append(Way(compile(chain) if tenant == "compiled" else chain, network))
    for number in range(args.rounds + 1):
        seed = secrets.randbits(32)
        answers = [way.run(workload, seed) for way in (ways if number % 2 else ways[::-1])]
        if answers[0] != answers[1]:
            raise SystemExit(f"{workload.name}: the answers differ: {answers[0]!r:.200} and {answers[1]!r:.200}")
        if number == 0:  # first connections, first use of code
            for way in ways:
                way.seconds.clear()
    native, compiled = ways
    ratios = [a / b for a, b in zip(native.seconds, compiled.seconds, strict=True)]
    print(
        f"{workload.name:28} {round_trip_ms:4.0f}  {native}  {compiled}  {statistics.median(ratios):5.2f}x "
        f"({min(ratios):.2f} - {max(ratios):.2f})",
        flush=True,
    )
    return {
        "workload": workload.name,
        "round_trip_ms": round_trip_ms,
        "native_s": native.seconds,
        "compiled_s": compiled.seconds,
        "native_requests": native.num_requests,
        "compiled_requests": compiled.num_requests,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-trips", type=float, nargs="+", default=[0, 50, 250], metavar="MS")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--json", help="write the times to this file")
    args = parser.parse_args()
    print(f"{MODEL}, {args.max_tokens} tokens per call, {args.rounds} rounds, Python {platform.python_version()}")
    print("chain                          ms  requests, seconds native    requests, seconds compiled  faster")
    with _server(list(TENANTS)) as url:
        results = [
            compare(workload, url, round_trip_ms, args) for round_trip_ms in args.round_trips for workload in WORKLOADS
        ]
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
