"""What planning a compiled chain costs on the client, before its one request leaves.

    python tests/bench/planning.py [--rounds 50]

No server is needed: planning sends nothing. Each chain's plan is checked before it is timed. `cpu` is the
process's, which another program on the machine disturbs less than `wall`. `formatting` is what LangChain's own
templates and payloads cost for the same calls, once each, with the answers known: a native run pays it anyway.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable

from langchain_macaw import ChatMacaw, compile
from langchain_macaw.compile import CompiledChain

LLM = ChatMacaw(model="macaw-demo", base_url="http://127.0.0.1:1/v1", temperature=0, max_tokens=50)
TEXT = StrOutputParser()


class Prompted(NamedTuple):
    """A prompt and a value for it, as a native run formats them."""

    prompt: ChatPromptTemplate
    value: dict[str, Any]


@dataclass(slots=True)
class Case:
    """A chain, its input, the plan that it must have, and the bar.

    Attributes:
        reads: How many calls read how many answers, as {answers: calls}.
        prompted: The formatting of a native run.
    """

    name: str
    chain: Runnable[Any, Any]
    input: Any
    reads: dict[int, int]
    prompted: list[Prompted]
    bar_ms: float

    def run(self, rounds: int) -> str:
        """Check, time and describe the case.

        Raises:
            SystemExit: The plan is not the expected one.
        """
        compiled = compile(self.chain)
        assert isinstance(compiled, CompiledChain)
        plan = compiled._plan([self.input], None, {}, False)
        calls = plan.request.calls if plan and plan.request else []
        reads = Counter(
            sum(type(part).__name__ == "VariablePart" for message in call.request.messages for part in message.content)
            for call in calls
        )
        if reads != self.reads:
            raise SystemExit(f"{self.name}: calls by answers read are {dict(reads)}, expected {self.reads}.")

        def format_natively() -> None:
            for prompt, value in self.prompted:
                LLM._get_request_payload(prompt.format_prompt(**value))

        planning, formatting = [], []
        for _ in range(rounds):  # alternated: what else the machine does hits both alike
            planning.append(timed(lambda: compiled._plan([self.input], None, {}, False)))
            formatting.append(timed(format_natively))
        wall, cpu = zip(*planning, strict=True)
        native = statistics.median(one.cpu_ms for one in formatting)
        verdict = "met" if statistics.median(cpu) < self.bar_ms else "MISSED"
        return (
            f"{self.name:22} {len(calls):5} {statistics.median(wall):9.2f} {min(wall):6.2f} "
            f"{statistics.median(cpu):8.2f} {min(cpu):6.2f} {native:11.2f} {self.bar_ms:6.1f} {verdict}"
        )


class Cost(NamedTuple):
    """Time of one round."""

    wall_ms: float
    cpu_ms: float


def timed(function: Callable[[], object]) -> Cost:
    """One call of `function`, without a collection of older garbage in it."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Cost(1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu))


def three_steps() -> Case:
    """Draft, criticise, improve."""
    prompts = [ChatPromptTemplate.from_template(f"{verb} this:\n\n{{text}}") for verb in ("Draft", "Judge", "Improve")]
    first, second, third = prompts
    chain = first | LLM | TEXT | second | LLM | TEXT | third | LLM | TEXT
    value = {"text": "an essay on parrots"}
    return Case("3-step chain", chain, value, {0: 1, 1: 2}, [Prompted(prompt, value) for prompt in prompts], 1.0)


def map_reduce(num_chunks: int) -> Case:
    """One summary for each chunk, and one of all summaries."""
    summarise = ChatPromptTemplate.from_template("Summarise this part:\n\n{text}")
    template = "Combine these summaries:\n\n{{#summaries}}- {{{.}}}\n{{/summaries}}"
    combine = ChatPromptTemplate.from_messages([("human", template)], template_format="mustache")
    chain = {"summaries": (summarise | LLM | TEXT).map()} | combine | LLM | TEXT
    chunks = [{"text": f"Chunk {i}. " + "All parrots are birds. " * 40} for i in range(num_chunks)]
    prompted = [Prompted(summarise, chunk) for chunk in chunks]
    prompted.append(Prompted(combine, {"summaries": [f"Summary {i}." for i in range(num_chunks)]}))
    return Case(f"{num_chunks}-way map-reduce", chain, chunks, {0: num_chunks, num_chunks: 1}, prompted, 15.0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    print("chain                  calls  wall: med    min cpu: med    min  formatting    bar (ms)")
    for case in (three_steps(), map_reduce(100)):
        print(case.run(args.rounds))


if __name__ == "__main__":
    main()
