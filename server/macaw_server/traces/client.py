"""The client that does a trace's work again: text completions, whose prompts are as long as the recorded ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from macaw.builder import ProgramBuilder, Ref
from macaw_server.bench.errors import BenchError
from macaw_server.bench.workload.clients import WorkloadClient
from macaw_server.bench.workload.records import Outcome, Run
from macaw_server.bench.workload.texts import Texts
from macaw_server.workloads import CallSpec, Output, ProgramSpec, Text


class ReplayClient(WorkloadClient):
    """Sends raw prompts, so that no template adds to them; a program that fails does not end the others.

    What a call of a program waits for without reading it is in its prompt as an empty variable, behind what other
    prompts begin with, too: the server sees the same graph and the same shared prefixes, and cannot prefill ahead what
    the answers before may have been needed for.

    Args:
        overhead: Tokens that the tokenizer puts before a prompt.
        **arguments: As for `WorkloadClient`.

    Attributes:
        failures: Of programs, by id.
    """

    def __init__(self, *, overhead: int, **arguments: Any) -> None:
        super().__init__(**arguments, chat=False)
        self.failures: dict[str, str] = {}
        self._overhead = overhead
        self._uses: Counter[Text] = Counter()

    async def run(self, programs: Sequence[ProgramSpec], *, timeline: bool = False) -> Run:
        """Send every program when it arrives, and wait for the last; those that failed are left out."""
        parts = (part for spec in programs for call in spec.calls for part in call.parts)
        self._uses = Counter(part for part in parts if isinstance(part, Text))
        run = await super().run(programs, timeline=timeline)
        return Run([outcome for outcome in run.outcomes if outcome.spec.id not in self.failures], run.timeline)

    async def _run_program(self, spec: ProgramSpec) -> Outcome:
        try:
            return await super()._run_program(spec)
        except BenchError as e:
            self.failures[spec.id] = str(e)
            return Outcome(spec)

    def _parts(self, call: CallSpec) -> list[str | Output]:
        first, *rest = call.parts
        if isinstance(first, Text):
            first = first._replace(length=max(1, first.length - self._overhead))
        return [self._texts[part] if isinstance(part, Text) else part for part in (first, *rest)]

    def _add_call(self, builder: ProgramBuilder, call: CallSpec, parts: list[str | Ref]) -> Ref:
        after = [
            builder.transform("lines", Ref(dep), start=0, stop=0, name=f"{call.id}/after/{dep}"[:256])
            for dep in call.after
        ]
        place = next((i for i, part in enumerate(call.parts) if isinstance(part, Output) or self._uses[part] < 2), None)
        place = len(parts) if place is None else place
        prompt = [*parts[:place], *after, *parts[place:]]
        return super()._add_call(builder, call, prompt)


def prompt_overhead(texts: Texts, tokenizer: Any) -> int:
    """Tokens that a tokenizer adds to the words of a prompt, at its beginning."""
    words = Text("overhead", 16)
    return len(tokenizer.encode(texts[words])) - words.length
