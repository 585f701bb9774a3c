"""LlamaIndex, plain against compiled, on the same engine and in alternation.

    python tests/bench/llamaindex.py [--model macaw-demo] [--rounds 7] [--round-trip-ms 50]

*tree* is `.query()` of tree_summarize over a text that makes 16 leaves; *refine* asks chunk after chunk, where what
counts is how long a later call waits for its first token; *questions* asks four questions over the same chunks.

All answers of both sides are compared (float32, greedy). Every round has a new text, and each side an API key of its
own, so that neither finds the other's in the cache.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
from llama_index.core import PromptTemplate
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatInProgressEvent, LLMChatStartEvent
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index_instrumentation import root_dispatcher
from pydantic import PrivateAttr

from langchain_macaw.demo import RoundTrip
from llama_index.llms.macaw import Macaw, compile
from macaw import MacawClient
from macaw.protocol import ProgramState
from macaw_server.bench.server import started

CHUNK_TOKENS = 300  # as LlamaIndex counts; it overlaps them by a tenth
LEAVES = 16
KEYS = ("plain", "compiled")
QUESTIONS = [f"What does the text say of {topic}?" for topic in ("pages", "tokens", "steps", "clients")]
# One token each, as LlamaIndex counts.
WORDS = ["the", "a", "cache", "page", "token", "prefix", "batch", "step", "model", "server", "client", "engine"]


class FirstTokens(BaseEventHandler):
    """Notes how long each streamed call takes from when it is made to its first token, in ms, as the client sees it."""

    _waits: list[float] = PrivateAttr(default_factory=list)
    _begun: float | None = PrivateAttr(default=None)

    def handle(self, event: Any, **kwargs: Any) -> None:
        """Take in an event of LlamaIndex's."""
        if isinstance(event, LLMChatStartEvent):
            self._begun = time.perf_counter()
        elif isinstance(event, LLMChatInProgressEvent) and self._begun is not None and event.response.delta:
            self._waits.append(1000 * (time.perf_counter() - self._begun))
            self._begun = None


class Words(BaseRetriever):
    """Finds the text of a seed, in nodes of a chunk each."""

    def __init__(self, seed: int, num_chunks: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        sizes = [CHUNK_TOKENS] + [CHUNK_TOKENS * 9 // 10 - 4] * (num_chunks - 1)
        self.nodes = [TextNode(text=" ".join(rng.choices(WORDS, k=size)), id_=str(i)) for i, size in enumerate(sizes)]

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=node) for node in self.nodes]


@dataclass(slots=True)
class Side:
    """Plain or compiled, against one server.

    Attributes:
        llm: The model.
        network: Between it and the server.
        observer: Without a network between.
    """

    compiled: bool
    llm: Macaw
    network: RoundTrip
    observer: MacawClient

    def engine(self, mode: str, seed: int, num_chunks: int, **kwargs: Any) -> RetrieverQueryEngine:
        """What a user builds, and compiles or not."""
        helper = PromptHelper(self.llm.metadata.context_window, self.llm.max_tokens, chunk_size_limit=CHUNK_TOKENS)
        synthesizer = get_response_synthesizer(
            llm=self.llm, prompt_helper=helper, response_mode=ResponseMode(mode), **kwargs
        )
        engine = RetrieverQueryEngine(Words(seed, num_chunks), synthesizer)
        return compile(engine) if self.compiled else engine

    def run(self, engine: RetrieverQueryEngine, questions: list[str]) -> Result:
        """Ask one after the other."""
        before = {program.id for program in self.observer.list_programs()}
        requests, first_tokens = self.network.num_requests, FirstTokens()
        root_dispatcher.add_event_handler(first_tokens)
        begin = time.perf_counter()
        answers = [str(engine.query(question)) for question in questions]
        seconds = time.perf_counter() - begin
        root_dispatcher.event_handlers.remove(first_tokens)
        programs = [program for program in self.observer.list_programs() if program.id not in before]
        num_calls = sum(len(p.calls) for p in programs) if self.compiled else self.network.num_requests - requests
        return Result(answers, seconds, first_tokens._waits, num_calls, programs)


@dataclass(slots=True)
class Result:
    """One run.

    Attributes:
        first_tokens_ms: For each call that streams, when its first token was there.
        programs: For a compiled side.
    """

    answers: list[str]
    seconds: float
    first_tokens_ms: list[float]
    num_calls: int
    programs: list[ProgramState]

    @property
    def computed_tokens(self) -> float:
        """Share of the prompts' tokens that were not in the cache."""
        totals = [program.totals for program in self.programs]
        return 1 - sum(t.cached_tokens for t in totals) / sum(t.prompt_tokens for t in totals)

    @property
    def ahead_tokens(self) -> float:
        """Tokens that were prefilled before their call was ready, per call but the first."""
        calls = [call for program in self.programs for call in program.calls]
        return sum(call.timings.prefilled_ahead_tokens for call in calls) / max(1, len(calls) - 1)


def alternate(sides: list[Side], rounds: int, run: Callable[[Side, int], Result], num_calls: int) -> list[list[Result]]:
    """Results by side; the first round warms up.

    Raises:
        SystemExit: The sides' answers differ, or calls are missing.
    """
    results: list[list[Result]] = [[] for _ in sides]
    for seed in range(rounds + 1):
        order = list(enumerate(sides))
        latest = {i: run(side, seed) for i, side in (order if seed % 2 else reversed(order))}
        if len({str(result.answers) for result in latest.values()}) > 1:
            raise SystemExit(f"The answers differ: {[result.answers for result in latest.values()]}")
        if seen := [result.num_calls for result in latest.values() if result.num_calls != num_calls]:
            raise SystemExit(f"{seen} calls where {num_calls} were to be measured.")
        if seed:
            for i, result in latest.items():
                results[i].append(result)
    return results


def tree(sides: list[Side], rounds: int) -> None:
    """Sixteen leaves and the root."""
    plain, compiled = alternate(  # and the root
        sides,
        rounds,
        lambda side, seed: side.run(side.engine("tree_summarize", seed, LEAVES), QUESTIONS[:1]),
        LEAVES + 1,
    )
    ratios = [p.seconds / c.seconds for p, c in zip(plain, compiled, strict=True)]
    medians = [statistics.median(result.seconds for result in side) for side in (plain, compiled)]
    print(
        f"tree: {LEAVES} leaves; plain {medians[0]:.3f} s, compiled {medians[1]:.3f} s, "
        f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def refine(sides: list[Side], rounds: int, num_chunks: int, name: str) -> None:
    """A chain of calls, streamed."""

    def run(side: Side, seed: int) -> Result:
        return side.run(side.engine("refine", seed, num_chunks, streaming=True), QUESTIONS[:1])

    for side, results in zip(sides, alternate(sides, rounds, run, num_chunks), strict=True):
        waits = [wait for result in results for wait in result.first_tokens_ms[1:]]
        print(
            f"refine: {num_chunks} calls, {'compiled' if side.compiled else 'plain'}, {name}: "
            f"{statistics.median(r.seconds for r in results):.3f} s; first token of a later call after "
            f"{statistics.median(waits):.1f} ms ({min(waits):.1f} to {max(waits):.1f}), "
            f"{statistics.mean(r.ahead_tokens for r in results):.0f} of its tokens ahead"
        )


def questions(side: Side, rounds: int, num_chunks: int) -> None:
    """Four questions, with the chunks before the question in the template, and behind it."""
    templates = {
        "context first": "Context:\n{context_str}\n\nQuestion: {query_str}\nAnswer: ",
        "question first": "Question: {query_str}\n\nContext:\n{context_str}\n\nAnswer: ",
    }
    for name, template in templates.items():
        computed = []
        for seed in range(rounds):
            engine = side.engine(
                "accumulate", 1000 + seed, num_chunks, text_qa_template=PromptTemplate(f"{name} {seed}. {template}")
            )
            computed.append(side.run(engine, QUESTIONS).computed_tokens)
        print(
            f"questions: {len(QUESTIONS)} over {num_chunks} chunks, {name}: {statistics.median(computed):.0%} computed"
        )


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="macaw-demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-trip-ms", type=float, default=50)
    parser.add_argument("--chunks", type=int, default=6, help="of refine and questions")
    parser.add_argument("--max-tokens", type=int, default=6)
    parser.add_argument("--ahead", nargs="*", default=["--ahead-rows=8"], help="flags of the server that works ahead")
    args = parser.parse_args()

    def measure(flags: list[str], function: Callable[[list[Side]], None]) -> None:
        common = ["--max-model-len", "4096", "--kv-memory", "512MiB", *[f"--api-key={key}" for key in KEYS]]
        with started(args.model, args.dtype, [*common, *flags]) as url:
            sides = []
            for key in KEYS:
                network = RoundTrip(args.round_trip_ms / 1000)
                http = httpx.Client(transport=network, timeout=600)
                options = {"temperature": 0, "max_tokens": args.max_tokens, "ignore_eos": True, "http_client": http}
                llm = Macaw(args.model, api_base=url, api_key=key, **options)
                sides.append(Side(key == "compiled", llm, network, MacawClient(url, key)))
            function(sides)

    def default(sides: list[Side]) -> None:
        tree(sides, args.rounds)
        questions(sides[1], args.rounds, args.chunks)

    measure([], default)
    for flags in (["--no-prefill-ahead"], args.ahead):
        measure(flags, functools.partial(refine, rounds=args.rounds, num_chunks=args.chunks, name=" ".join(flags)))


if __name__ == "__main__":
    main()
