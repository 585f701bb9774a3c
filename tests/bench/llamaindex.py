"""LlamaIndex, plain against compiled, on the same engine and in alternation.

    python tests/bench/llamaindex.py [--model macaw-demo] [--parts tree extractors questions refine] [--rounds 7]

*tree* is `.query()` of tree_summarize over a text that makes 16 leaves; *extractors* sends 16 nodes through a
`KeywordExtractor`, and the nodes of four documents through a `TitleExtractor`; *questions* asks four questions over the
same chunks; *refine* asks chunk after chunk, where what counts is how long a later call waits for its first token:
plain, compiled for a server that does not work ahead (`--off`), and compiled for one that does (`--on`), with a
template that has the context before the earlier answer (LlamaIndex's for chats) and one that has it behind (its for
completions).

All answers are compared (greedy): in float32 they must be equal; in bfloat16, where the rows of a step may round
differently, it is told how many rounds were. Every round has a new text, and each side an API key or a server of its
own, so that none finds another's in the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
from llama_index.core import PromptTemplate
from llama_index.core.extractors import BaseExtractor, KeywordExtractor, TitleExtractor
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import (
    LLMChatInProgressEvent,
    LLMChatStartEvent,
    LLMCompletionInProgressEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.prompts.chat_prompts import CHAT_REFINE_PROMPT
from llama_index.core.prompts.default_prompts import DEFAULT_REFINE_PROMPT
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode
from llama_index_instrumentation import root_dispatcher
from pydantic import PrivateAttr

from langchain_macaw.demo import RoundTrip
from llama_index.llms.macaw import Macaw, compile
from macaw import MacawClient
from macaw.protocol import CallState, ProgramState
from macaw_server.bench.server import started
from macaw_server.bench.workload.clients import RoundTrip as AsyncRoundTrip

CHUNK_TOKENS = 300  # as LlamaIndex counts; it overlaps them by a tenth
LEAVES = 16
DOCUMENTS = 4  # whose nodes the leaves are, for extractors
PARTS = ("tree", "extractors", "questions", "refine")
KEYS = ("plain", "compiled")
LOOP = asyncio.new_event_loop()  # one for all rounds, as the connections of an asynchronous client are of one
QUESTIONS = [f"What does the text say of {topic}?" for topic in ("pages", "tokens", "steps", "clients")]
REFINE_TEMPLATES = {"context, then answer": CHAT_REFINE_PROMPT, "answer, then context": DEFAULT_REFINE_PROMPT}
# One token each, as LlamaIndex counts.
WORDS = ["the", "a", "cache", "page", "token", "prefix", "batch", "step", "model", "server", "client", "engine"]


class FirstTokens(BaseEventHandler):
    """Notes how long each streamed call takes from when it is made to its first token, in ms, as the client sees it."""

    _waits: list[float] = PrivateAttr(default_factory=list)
    _begun: float | None = PrivateAttr(default=None)

    def handle(self, event: Any, **kwargs: Any) -> None:
        """Take in an event of LlamaIndex's."""
        if isinstance(event, LLMChatStartEvent | LLMCompletionStartEvent):
            self._begun = time.perf_counter()
        elif not isinstance(event, LLMChatInProgressEvent | LLMCompletionInProgressEvent):
            return
        elif self._begun is not None and event.response.delta:
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
        name: For what is printed.
        llm: The model.
        network, async_network: Between it and the server.
        observer: Without a network between.
    """

    name: str
    compiled: bool
    llm: Macaw
    network: RoundTrip
    async_network: AsyncRoundTrip
    observer: MacawClient

    @property
    def num_requests(self) -> int:
        """Sent so far."""
        return self.network.num_requests + self.async_network.num_requests

    def engine(self, mode: str, seed: int, num_chunks: int, **kwargs: Any) -> RetrieverQueryEngine:
        """What a user builds, and compiles or not."""
        helper = PromptHelper(self.llm.metadata.context_window, self.llm.max_tokens, chunk_size_limit=CHUNK_TOKENS)
        synthesizer = get_response_synthesizer(
            llm=self.llm, prompt_helper=helper, response_mode=ResponseMode(mode), **kwargs
        )
        engine = RetrieverQueryEngine(Words(seed, num_chunks), synthesizer)
        return compile(engine) if self.compiled else engine

    def query(self, engine: RetrieverQueryEngine, questions: list[str]) -> Result:
        """Ask one after the other."""
        return self.run(lambda: [str(engine.query(question)) for question in questions])

    def extract(self, extractor: BaseExtractor, seed: int) -> Result:
        """The metadata of the nodes of `DOCUMENTS`."""
        nodes = Words(seed, LEAVES).nodes
        for i, node in enumerate(nodes):
            node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=f"document {i % DOCUMENTS}")
        extractor = compile(extractor) if self.compiled else extractor
        return self.run(lambda: [str(metadata) for metadata in LOOP.run_until_complete(extractor.aextract(nodes))])

    def run(self, work: Callable[[], list[str]]) -> Result:
        """What it answers, and what it takes."""
        before = {program.id for program in self.observer.list_programs()}
        requests, first_tokens = self.num_requests, FirstTokens()
        root_dispatcher.add_event_handler(first_tokens)
        begin = time.perf_counter()
        answers = work()
        seconds = time.perf_counter() - begin
        root_dispatcher.event_handlers.remove(first_tokens)
        programs = [program for program in self.observer.list_programs() if program.id not in before]
        num_calls = sum(len(p.calls) for p in programs) if self.compiled else self.num_requests - requests
        return Result(answers, seconds, first_tokens._waits, num_calls, programs)


@dataclass(slots=True)
class Result:
    """One run.

    Attributes:
        first_tokens_ms: For each call that streams, when its first token was there, as the client sees it.
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
    def later_calls(self) -> list[CallState]:
        """All but the first."""
        return [call for program in self.programs for call in sorted(program.calls, key=lambda call: call.depth)[1:]]


def alternate(
    sides: list[Side], rounds: int, run: Callable[[Side, int], Result], num_calls: int, *, exact: bool = True
) -> tuple[list[list[Result]], int]:
    """Results by side, and in how many rounds all sides answered the same; the first round warms up.

    Raises:
        SystemExit: Answers differ that must be `exact`, or calls are missing.
    """
    results: list[list[Result]] = [[] for _ in sides]
    num_equal = 0
    for seed in range(rounds + 1):
        order = list(enumerate(sides))
        latest = {i: run(side, seed) for i, side in (order if seed % 2 else reversed(order))}
        equal = len({str(result.answers) for result in latest.values()}) == 1
        if exact and not equal:
            raise SystemExit(f"The answers differ: {[result.answers for result in latest.values()]}")
        if seen := [result.num_calls for result in latest.values() if result.num_calls != num_calls]:
            raise SystemExit(f"{seen} calls where {num_calls} were to be measured.")
        if seed:
            num_equal += equal
            for i, result in latest.items():
                results[i].append(result)
    return results, num_equal


def ratio(name: str, sides: list[Side], rounds: int, run: Callable[[Side, int], Result], num_calls: int) -> None:
    """How much faster the compiled side is."""
    (plain, compiled), _ = alternate(sides, rounds, run, num_calls)
    ratios = [p.seconds / c.seconds for p, c in zip(plain, compiled, strict=True)]
    medians = [statistics.median(result.seconds for result in side) for side in (plain, compiled)]
    print(
        f"{name}: {num_calls} calls; plain {medians[0]:.3f} s, compiled {medians[1]:.3f} s, "
        f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def tree(sides: list[Side], rounds: int) -> None:
    """Sixteen leaves and the root."""

    def run(side: Side, seed: int) -> Result:
        return side.query(side.engine("tree_summarize", seed, LEAVES), QUESTIONS[:1])

    ratio("tree", sides, rounds, run, LEAVES + 1)


def extractors(sides: list[Side], rounds: int) -> None:
    """A call for each node; and one for each node and each document."""

    def keywords(side: Side, seed: int) -> Result:
        return side.extract(KeywordExtractor(llm=side.llm, show_progress=False), 200 + seed)

    def titles(side: Side, seed: int) -> Result:
        return side.extract(TitleExtractor(llm=side.llm, nodes=LEAVES // DOCUMENTS, show_progress=False), 300 + seed)

    ratio("KeywordExtractor", sides, rounds, keywords, LEAVES)
    ratio("TitleExtractor", sides, rounds, titles, LEAVES + DOCUMENTS)


def refine(sides: list[Side], rounds: int, num_chunks: int, order: str, *, exact: bool) -> None:
    """A chain of calls, streamed; `order` is that of the template."""

    def run(side: Side, seed: int) -> Result:
        seed += 100 * list(REFINE_TEMPLATES).index(order)  # nothing is cached from the other order
        engine = side.engine("refine", seed, num_chunks, streaming=True, refine_template=REFINE_TEMPLATES[order])
        return side.query(engine, QUESTIONS[:1])

    by_side, num_equal = alternate(sides, rounds, run, num_chunks, exact=exact)
    print(f"refine: {num_chunks} calls; {order}; all answered the same in {num_equal} of {rounds} rounds")
    for side, results in zip(sides, by_side, strict=True):
        waits = [wait for result in results for wait in result.first_tokens_ms[1:]]
        seconds = spread([result.seconds for result in results], 2)
        line = f"  {side.name}: {seconds} s; a later call's first token after {spread(waits)} ms"
        if calls := [call for result in results for call in result.later_calls]:
            own = [
                call.timings.first_token_ms - call.timings.ready_ms
                for call in calls
                if call.timings.first_token_ms is not None and call.timings.ready_ms is not None
            ]
            ahead = statistics.mean(call.timings.prefilled_ahead_tokens for call in calls)
            line += f", at the server {spread(own)} ms after it is ready; {ahead:.0f} tokens ahead"
        print(line, flush=True)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """The median, the least and the most."""
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


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
            computed.append(side.query(engine, QUESTIONS).computed_tokens)
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
    parser.add_argument("--max-tokens", type=int, default=6, help="of an answer of all but refine")
    parser.add_argument("--refine-tokens", type=int, default=48, help="of an answer of refine")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--orders", nargs="+", choices=REFINE_TEMPLATES, default=list(REFINE_TEMPLATES))
    parser.add_argument("--on", nargs="*", default=[], help="flags of refine's server that works ahead")
    parser.add_argument("--off", nargs="*", default=["--no-prefill-ahead"], help="of the one that does not")
    args = parser.parse_args()

    def serve(stack: ExitStack, flags: list[str]) -> str:
        common = ["--max-model-len", "4096", "--kv-memory", "512MiB", *[f"--api-key={key}" for key in KEYS]]
        return stack.enter_context(started(args.model, args.dtype, [*common, *flags]))

    def side(url: str, name: str, max_tokens: int) -> Side:
        network = RoundTrip(args.round_trip_ms / 1000)
        async_network = AsyncRoundTrip(args.round_trip_ms / 1000)
        options = {
            "temperature": 0,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "http_client": httpx.Client(transport=network, timeout=600),
            "async_http_client": httpx.AsyncClient(transport=async_network, timeout=600),
        }
        key = name.split(",")[0]
        llm = Macaw(api_base=url, api_key=key, **options)
        assert llm.metadata.context_window  # asks the server once, before requests are counted
        return Side(name, key == "compiled", llm, network, async_network, MacawClient(url, key))

    if {"tree", "extractors", "questions"} & {*args.parts}:
        with ExitStack() as stack:
            url = serve(stack, [])
            sides = [side(url, name, args.max_tokens) for name in KEYS]
            if "tree" in args.parts:
                tree(sides, args.rounds)
            if "extractors" in args.parts:
                extractors(sides, args.rounds)
            if "questions" in args.parts:
                questions(sides[1], args.rounds, args.chunks)
    if "refine" in args.parts:
        with ExitStack() as stack:
            on, off = serve(stack, args.on), serve(stack, args.off)
            ways = [
                (on, "plain"),
                (off, f"compiled, {' '.join(args.off)}"),
                (on, f"compiled, {' '.join(args.on) or 'default'}"),
            ]
            sides = [side(url, name, args.refine_tokens) for url, name in ways]
            for order in args.orders:
                refine(sides, args.rounds, args.chunks, order, exact=args.dtype == "float32")


if __name__ == "__main__":
    main()
