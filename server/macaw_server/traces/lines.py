"""From what a server tells of calls that have ended to lines of a trace."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from macaw.protocol import TracedCall

MAX_GAP_MS = 300_000.0
"""An application whose client did nothing for longer is another run of it: servers give up programs that idle."""
_RUN_ID = re.compile(
    r"[-_:.#/ ]*\b(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?=[a-f]*\d)[0-9a-f]{8,}|\d+)\b", re.IGNORECASE
)
"""What tells one run of an application from another in its name."""
_NAMELESS = {"program": "programs", "application": "applications", "request": "requests"}


@dataclass(slots=True)
class Totals:
    """Of all calls.

    Attributes:
        num_programs, num_calls: In the trace.
        num_cut: Calls that failed or were cancelled after they had begun.
        num_lost: Calls that the server did not keep for this reader.
        prompt_tokens, cached_tokens, output_tokens: By the server's account.
    """

    num_programs: int = 0
    num_calls: int = 0
    num_cut: int = 0
    num_lost: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class _Program:
    """A program of the trace; its calls in the order in which they ended.

    Attributes:
        id: In the trace.
        names: Of each call's lines.
        ended_ms: When each call ended.
        ends: The same in order, and up to each of them `latest`, the latest start.
    """

    id: str
    names: dict[str, list[str]] = field(default_factory=dict)
    ended_ms: dict[str, float] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    latest: list[float] = field(default_factory=list)

    def add(self, call: TracedCall, names: list[str]) -> None:
        self.names[call.node], self.ended_ms[call.node] = names, call.ended_ms
        self.nodes.append(call.node)
        self.ends.append(call.ended_ms)
        self.latest.append(max(call.ready_ms, self.latest[-1]) if self.latest else call.ready_ms)

    def last_before(self, time_ms: float) -> list[str]:
        """Calls that had ended by then, less those before others of them: what a client may have waited for."""
        end = bisect_right(self.ends, time_ms)
        begin = bisect_right(self.ends, self.latest[end - 1]) if end else 0
        return self.nodes[begin:end]


class TraceLines:
    """Names programs, numbers blocks, and finds out what calls have waited for.

    The graph says which answers a call reads. A call that reads none (a request with hints, or one that was added to
    a program with the answers in its text) is taken to have waited for what ended last before it came; the time
    since then is the client's. A request without hints whose prompt goes on with an answer belongs to where that is
    from: a conversation is a program.

    Args:
        block_size: Tokens of a block.

    Attributes:
        totals: Of all calls so far.
    """

    def __init__(self, block_size: int) -> None:
        self.totals = Totals()
        self.block_size = block_size
        self._numbers: dict[tuple[str, int], int] = {}
        self._programs: dict[tuple[str, str], _Program] = {}
        self._tenants: dict[str, str] = {}
        self._answers: dict[int, _Program] = {}  # by the numbers of their blocks

    def add(self, tenant: str, call: TracedCall, start_ms: float) -> Iterator[dict[str, Any]]:
        """The lines of a call, one for each choice; calls come in the order in which they end.

        Args:
            tenant: Whose recording it comes from.
            call: The call.
            start_ms: From which timestamps count.
        """
        hash_ids = [self._number(tenant, number) for number in call.blocks]
        answer_ids = [self._number(tenant, number) for number in call.answer]
        program = self._program(tenant, call, hash_ids)
        deps = [dep for dep in call.deps if dep in program.names] or program.last_before(call.ready_ms)
        line: dict[str, Any] = {
            "timestamp": round(max(0.0, call.ready_ms - start_ms), 3),
            "input_length": call.prompt_tokens,
            "output_length": 0,
            "hash_ids": hash_ids,
            "block_size": self.block_size,
            "program_id": program.id,
            "node": "",
            "deps": [name for dep in deps for name in program.names[dep]],
            "tenant": self._tenants.setdefault(tenant, f"t{len(self._tenants)}"),
            "app": _app(call),
        }
        if deps:
            gap_ms = call.ready_ms - max(program.ended_ms[dep] for dep in deps)
            line["gap_ms"] = round(max(0.0, gap_ms), 3)
        if call.objective != "latency":
            line["objective"] = call.objective
        if call.deadline_ms is not None:
            # The program of the trace arrives with its first call.
            line["deadline_ms"] = round(max(1.0, call.deadline_ms - (call.ready_ms - call.arrival_ms)), 3)
        name = call.node if call.kind == "program" else f"call{len(program.nodes)}"
        names = [name, *(f"{name}/choice{i}" for i in range(1, len(call.output_tokens)))]
        program.add(call, names)
        self._answers |= dict.fromkeys(answer_ids, program)
        self._count(call)
        for i, output_tokens in enumerate(call.output_tokens):
            answer = {"answer_ids": answer_ids} if answer_ids and i == 0 else {}
            yield line | {"node": names[i], "output_length": max(1, output_tokens)} | answer

    def _program(self, tenant: str, call: TracedCall, hash_ids: list[int]) -> _Program:
        program = self._programs.get((tenant, call.program))
        if program is None and call.kind == "request":
            program = next((self._answers[i] for i in reversed(hash_ids) if i in self._answers), None)
        if program is not None and call.kind != "program":
            last = program.last_before(call.ready_ms)
            if last and call.ready_ms - max(program.ended_ms[node] for node in last) > MAX_GAP_MS:
                program = None
        if program is None:
            program = _Program(f"p{self.totals.num_programs}")
            self.totals.num_programs += 1
        self._programs[tenant, call.program] = program
        return program

    def _number(self, tenant: str, number: int) -> int:
        return self._numbers.setdefault((tenant, number), len(self._numbers))

    def _count(self, call: TracedCall) -> None:
        totals = self.totals
        totals.num_calls += 1
        totals.num_cut += call.error is not None
        totals.prompt_tokens += call.prompt_tokens
        totals.cached_tokens += call.cached_tokens
        totals.output_tokens += sum(call.output_tokens)


def _app(call: TracedCall) -> str:
    """The application's name without what tells one run from another."""
    return _RUN_ID.sub("", call.app or "").strip("-_:.#/ ") or _NAMELESS[call.kind]
