"""Prefill ahead and pipelining on and off, in alternation, on one server each: how long a program takes.

    python tests/bench/ahead.py [--model macaw-demo] [--rounds 7] [--on=--ahead-rows=8] [--off=--no-pipelining]

*chain* summarises a document chunk by chunk; each hop's prompt is a chunk and then the summary so far. *refine* has the
summary first: only what the hop before writes can be prefilled. *client* is a chain between whose hops the client takes
a while (a tool, a search): each prompt is a chunk and then what the client brings. *map-reduce* has nothing to prefill
worth its while, and must not lose.

All answers of both servers are compared (greedy): in float32 they must be equal; in bfloat16, where the rows of a step
may round differently, it is told how many rounds were. Every round has new documents, so that nothing is cached from
the one before. The time is the client's, from the post to the end.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

from macaw import MacawClient, ProgramBuilder
from macaw.protocol import CallCompleted, ProgramCompleted, ProgramRequest, VariableResolved
from macaw_server.bench.server import started

OPTIONS = {"temperature": 0, "ignore_eos": True}
WORDS = (
    "the",
    "a",
    "cache",
    "page",
    "token",
    "prefix",
    "batch",
    "step",
    "model",
    "server",
    "client",
    "parrot",
    "engine",
)


class Round:
    """What one round asks: documents by seed.

    Args:
        seed: Of the documents.
        num_words: Of a chunk.
        num_hops: Of a chain.
        max_tokens: Of an answer.
        gap_s: How long the client takes between hops.
    """

    def __init__(self, seed: int, num_words: int, num_hops: int, max_tokens: int, gap_s: float) -> None:
        rng = random.Random(seed)
        self.chunks = [" ".join(rng.choices(WORDS, k=num_words)) for _ in range(num_hops)]
        self.options = {**OPTIONS, "max_tokens": max_tokens}
        self.gap_s = gap_s

    def chain(self) -> ProgramRequest:
        """Chunk, then the summary so far."""
        b = ProgramBuilder()
        last = b.complete(f"Summarise:\n{self.chunks[0]}", name="hop-0", **self.options)
        for i, chunk in enumerate(self.chunks[1:], 1):
            last = b.complete(f"Go on:\n{chunk}\nSo far:\n", last, name=f"hop-{i}", **self.options)
        b.target(last)
        return b.build(stream=True)

    def refine(self) -> ProgramRequest:
        """The summary so far, then a chunk."""
        b = ProgramBuilder()
        last = b.complete(f"Summarise:\n{self.chunks[0]}", name="hop-0", **self.options)
        for i, chunk in enumerate(self.chunks[1:], 1):
            last = b.complete("So far:\n", last, f"\nRefine it by:\n{chunk}", name=f"hop-{i}", **self.options)
        b.target(last)
        return b.build(stream=True)

    def client(self) -> ProgramRequest:
        """Chunk, then what the client brings after the hop before."""
        b = ProgramBuilder()
        last = b.complete(f"Plan:\n{self.chunks[0]}", name="hop-0", **self.options)
        for i, chunk in enumerate(self.chunks[1:], 1):
            found = b.external(f"found-{i}")
            b.target(last)
            last = b.complete(f"Notes:\n{chunk}\nFound:\n", found, name=f"hop-{i}", **self.options)
        b.target(last)
        return b.build(stream=True)

    def map_reduce(self) -> ProgramRequest:
        """Every chunk at once, and all answers into one."""
        b = ProgramBuilder()
        maps = [
            b.complete(f"Summarise:\n{chunk}", name=f"map-{i}", **self.options) for i, chunk in enumerate(self.chunks)
        ]
        b.target(
            b.complete("Combine these summaries:\n", b.join(maps, separator="\n- "), name="reduce", **self.options)
        )
        return b.build(stream=True)


class Result:
    """One run: its seconds, its answers, and what was prefilled ahead."""

    def __init__(self, client: MacawClient, request: ProgramRequest, gap_s: float) -> None:
        begin = time.perf_counter()
        self.answers: dict[str, str] = {}
        self.tokens, self.saved_ms, hops = 0, 0.0, 0
        with client.stream_program(request) as stream:
            for event in stream:
                match event:
                    case VariableResolved(variable=name, value=value) if name.startswith("hop-"):
                        self.answers[name] = value
                        hops += 1
                        if f"found-{hops}" in request.variables:
                            time.sleep(gap_s)
                            client.set_variable(stream.program_id, f"found-{hops}", f"result {hops}")
                    case CallCompleted(timings=t):
                        self.tokens += t.prefilled_ahead_tokens
                        self.saved_ms += t.ahead_saved_ms
                    case ProgramCompleted(variables=values):
                        self.answers |= values
        self.seconds = time.perf_counter() - begin


def measure(name: str, off: MacawClient, on: MacawClient, rounds: list[Round], *, exact: bool) -> None:
    """One line of the table; the first round warms up."""
    pairs: list[tuple[Result, Result]] = []
    num_equal = 0
    for i, asked in enumerate(rounds):
        request: Callable[[], ProgramRequest] = getattr(asked, name)
        sides = (off, on) if i % 2 else (on, off)
        results = {client: Result(client, request(), asked.gap_s) for client in sides}
        equal = results[off].answers == results[on].answers
        if exact and not equal:
            raise SystemExit(f"{name}: the answers differ.")
        num_equal += equal and i > 0
        if i:
            pairs.append((results[off], results[on]))
    ratios = [plain.seconds / ahead.seconds for plain, ahead in pairs]
    plain, ahead = (statistics.median(r.seconds for r in side) for side in zip(*pairs, strict=True))
    hops = max(1, len(rounds[0].chunks) - 1)
    print(
        f"{name:11} {plain:8.3f} {ahead:8.3f} {statistics.median(ratios):7.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
        f" {1000 * (plain - ahead) / hops:9.1f} {statistics.median(r.saved_ms for _, r in pairs) / hops:9.1f}"
        f" {statistics.median(r.tokens for _, r in pairs) / hops:9.0f} {num_equal:5}/{len(pairs)}",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="macaw-demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--words", type=int, default=400, help="of a chunk")
    parser.add_argument("--hops", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=50)
    parser.add_argument("--gap-ms", type=float, default=100)
    parser.add_argument("--shapes", nargs="+", default=["chain", "refine", "client", "map_reduce"])
    parser.add_argument("--on", nargs="*", default=[], help="more flags of the one server")
    parser.add_argument("--off", nargs="*", default=["--no-prefill-ahead"], help="of the other")
    args = parser.parse_args()
    rounds = [
        Round(seed, args.words, args.hops, args.max_tokens, args.gap_ms / 1000) for seed in range(args.rounds + 1)
    ]
    common = ["--max-model-len", "4096", "--kv-memory", "512MiB"]
    with (
        started(args.model, args.dtype, [*common, *args.off]) as off,
        started(args.model, args.dtype, [*common, *args.on]) as on,
        MacawClient(off) as off_client,
        MacawClient(on) as on_client,
    ):
        print(f"{args.model}: {args.off or 'default'} against {args.on or 'default'}; {args.hops} hops")
        print("shape          off s     on s   ratio (min - max)     saved/hop  estimate tokens/hop  equal")
        for name in args.shapes:
            measure(name, off_client, on_client, rounds, exact=args.dtype == "float32")


if __name__ == "__main__":
    main()
