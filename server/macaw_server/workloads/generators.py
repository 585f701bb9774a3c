"""The workloads, by name: seeded generators of programs in order of arrival.

Lengths are those of Parrot's evaluation (Lin et al., OSDI 2024, section 8) as far as it has the workload, times one
factor, so that a small machine runs the same shapes.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from macaw_server.workloads.types import CallSpec, Output, Part, ProgramSpec, Text


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """What all workloads have in common.

    Attributes:
        seed: The same seed is the same workload.
        scale: Factor of all lengths.
        num_programs: None is the workload's own number.
        rate: Programs per second, Poisson; 0 lets all arrive at once, None is the workload's own rate.
        background: Chats per second that come on top, as long as programs arrive and a minute at least.
        tenants: Share of each tenant in the programs.
    """

    seed: int = 0
    scale: float = 1.0
    num_programs: int | None = None
    rate: float | None = None
    background: float = 0.0
    tenants: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"A scale of {self.scale} leaves no tokens; it must be above 0.")
        if self.num_programs is not None and self.num_programs < 1:
            raise ValueError(f"{self.num_programs} programs are no workload; it takes at least 1.")
        if (self.rate or 0) < 0 or self.background < 0:
            raise ValueError(f"rate {self.rate} and background {self.background} must be at least 0.")
        if not self.tenants or min(self.tenants) <= 0:
            raise ValueError(f"Tenants' shares are {self.tenants}; each must be above 0.")


class _Draw:
    """Random lengths, scaled; at least one token."""

    def __init__(self, seed: str, scale: float) -> None:
        self.random = random.Random(seed)
        self.scale = scale

    def tokens(self, length: float) -> int:
        return max(1, round(length * self.scale))

    def between(self, low: float, high: float) -> int:
        return self.tokens(self.random.uniform(low, high))

    def lognormal(self, mu: float, sigma: float, high: float) -> int:
        return self.tokens(min(self.random.lognormvariate(mu, sigma), high))


Shape = Callable[[_Draw, str], ProgramSpec]
"""Makes one program that arrives at 0 and has the given id."""

DOCUMENT_LEN = 20_000
CHUNK_LENS = (512, 1024, 1536, 2048)
SUMMARY_LENS = (25, 50, 75, 100)


def _chunks(draw: _Draw, program_id: str) -> tuple[list[Text], int]:
    """A document in chunks, and the length of a summary."""
    chunk_len, summary_len = draw.random.choice(CHUNK_LENS), draw.random.choice(SUMMARY_LENS)
    lengths = [chunk_len] * (DOCUMENT_LEN // chunk_len) + [DOCUMENT_LEN % chunk_len or chunk_len]
    chunks = [Text(f"{program_id}/chunk{i}", draw.tokens(length)) for i, length in enumerate(lengths)]
    return chunks, draw.tokens(summary_len)


def _chain_summary(draw: _Draw, program_id: str) -> ProgramSpec:
    """Each call refines the summary with one more chunk; the existing summary ends the prompt (LlamaIndex)."""
    chunks, summary_len = _chunks(draw, program_id)
    instruction = Text("chain-summary", draw.tokens(60))
    calls = []
    for i, chunk in enumerate(chunks):
        parts: tuple[Part, ...] = (instruction, chunk) + ((Output(f"refine{i - 1}"),) if i else ())
        calls.append(CallSpec(f"refine{i}", parts, summary_len))
    return ProgramSpec(program_id, "chain-summary", 0.0, tuple(calls), (calls[-1].id,))


def _map_reduce(draw: _Draw, program_id: str) -> ProgramSpec:
    """A summary of each chunk, and one of all summaries."""
    chunks, summary_len = _chunks(draw, program_id)
    instruction = Text("map", draw.tokens(60))
    maps = [CallSpec(f"map{i}", (instruction, chunk), summary_len) for i, chunk in enumerate(chunks)]
    reduce = CallSpec("reduce", (Text("reduce", draw.tokens(60)), *(Output(call.id) for call in maps)), summary_len)
    return ProgramSpec(program_id, "map-reduce", 0.0, (*maps, reduce), ("reduce",))


def _copilot(draw: _Draw, program_id: str) -> ProgramSpec:
    """A long system prompt that all share; prompts of 5224 to 7492 tokens, 6167 in the mean."""
    query_len = 117 + 2268 * draw.random.betavariate(2.0, 2.81)
    parts = (Text("copilot", draw.tokens(5107)), Text(f"{program_id}/query", draw.tokens(query_len)))
    return _single("copilot", program_id, parts, draw.between(183, 800))


GPTS = {"productivity": (7437, 7, 704), "programming": (1116, 8, 89), "game": (1694, 4, 631), "art": (2031, 4, 416)}
"""Tokens of prefix, query and output of four GPTs."""


def _gpts(draw: _Draw, program_id: str) -> ProgramSpec:
    """One of four apps, each with a prefix that its users share."""
    app = draw.random.choice(list(GPTS))
    prefix_len, query_len, output_len = GPTS[app]
    query = Text(f"{program_id}/query", draw.between(0.5 * query_len, 1.5 * query_len))
    parts = (Text(f"gpts/{app}", draw.tokens(prefix_len)), query)
    return _single(f"gpts/{app}", program_id, parts, draw.between(0.75 * output_len, 1.25 * output_len))


def _multi_agent(draw: _Draw, program_id: str) -> ProgramSpec:
    """MetaGPT: an architect, coders of 4 to 16 files, and four rounds in which each file is reviewed and revised."""
    num_files = draw.random.randint(4, 16)
    design = CallSpec("architect", (Text("architect", draw.tokens(120)), _own(draw, program_id, 62)), draw.tokens(822))
    shared = {role: Text(role, draw.tokens(length)) for role, length in _ROLES.items()}
    calls, last = [design], [""] * num_files

    def add(call_id: str, role: str, file: int, reads: tuple[Part, ...], output_len: int) -> str:
        task = _own(draw, f"{program_id}/file{file}", 49)
        calls.append(CallSpec(call_id, (shared[role], Output("architect"), task, *reads), output_len))
        return call_id

    for file in range(num_files):
        last[file] = add(f"code{file}", "coder", file, (), draw.between(400, 800))
    for i in range(4):
        reviews = [
            add(f"review{file}.{i}", "reviewer", file, (Output(last[file]),), draw.between(172, 300))
            for file in range(num_files)
        ]
        for file, review in enumerate(reviews):
            reads = (Output(last[file]), Output(review))
            last[file] = add(f"revise{file}.{i}", "reviser", file, reads, draw.between(400, 800))
    return ProgramSpec(program_id, "multi-agent", 0.0, tuple(calls), tuple(last))


_ROLES = {"coder": 2120, "reviewer": 2246, "reviser": 2468}
"""Tokens of each role's own prompt, such that whole prompts are about 2991, 3717 and 4175 long."""


def _chat(draw: _Draw, program_id: str) -> ProgramSpec:
    """One turn of a chat; lengths as in ShareGPT."""
    parts = (_own(draw, program_id, min(draw.random.lognormvariate(6.63, 0.99), 6000)),)
    return _single("chat", program_id, parts, draw.lognormal(5.02, 0.86, 2000))


def _agent(draw: _Draw, program_id: str) -> ProgramSpec:
    """A loop of 10 to 40 turns: what was said before, and what a tool answered after 0.1 to 10 s."""
    history: tuple[Part, ...] = (Text("agent", draw.tokens(1500)), _own(draw, program_id, 200))
    calls: list[CallSpec] = []
    for i in range(draw.random.randint(10, 40)):
        gap_s = 0.0
        if calls:
            gap_s = 10 ** draw.random.uniform(-1, 1)
            tool = Text(f"{program_id}/tool{i}", draw.between(20, 380))
            history = (*history, Output(calls[-1].id), tool)
        calls.append(CallSpec(f"turn{i}", history, draw.between(30, 170), gap_s=gap_s))
    return ProgramSpec(program_id, "agents", 0.0, tuple(calls), (calls[-1].id,))


def _own(draw: _Draw, key: str, length: float) -> Text:
    return Text(f"{key}/own", draw.tokens(length))


def _single(app: str, program_id: str, parts: tuple[Part, ...], output_len: int) -> ProgramSpec:
    return ProgramSpec(program_id, app, 0.0, (CallSpec("call", parts, output_len),), ("call",))


@dataclass(frozen=True, slots=True)
class Stream:
    """Programs of one shape.

    Attributes:
        name: Prefix of their ids.
        shape: Makes one.
        num_programs: How many.
        rate: Per second, Poisson; 0 lets all arrive at once.
    """

    name: str
    shape: Shape
    num_programs: int
    rate: float


WORKLOADS: dict[str, tuple[Stream, ...]] = {
    "agents": (Stream("agents", _agent, 32, 1.0),),
    "chain-summary": (Stream("chain-summary", _chain_summary, 25, 0.0),),
    "chat": (Stream("chat", _chat, 64, 1.0),),
    "copilot": (Stream("copilot", _copilot, 64, 0.0),),
    "gpts": (Stream("gpts", _gpts, 256, 4.0),),
    "map-reduce": (Stream("map-reduce", _map_reduce, 9, 0.0),),
    "mixed": (Stream("map-reduce", _map_reduce, 9, 0.0), Stream("chat", _chat, 40, 1.0)),
    "multi-agent": (Stream("multi-agent", _multi_agent, 4, 0.0),),
}
"""By name, the streams of programs that it is made of."""


def make_workload(name: str, options: WorkloadOptions) -> Iterator[ProgramSpec]:
    """The programs of a workload, in order of arrival; made as they are asked for.

    A given number is the number of the first stream's programs, and a given rate that stream's; the other streams stay
    as they are.

    Raises:
        ValueError: There is no such workload; the message has those there are.
    """
    if name not in WORKLOADS:
        raise ValueError(f"No workload {name!r}; choose one of {', '.join(sorted(WORKLOADS))}.")
    first, *others = WORKLOADS[name]
    num_programs = first.num_programs if options.num_programs is None else options.num_programs
    rate = first.rate if options.rate is None else options.rate
    streams = [replace(first, num_programs=num_programs, rate=rate), *others]
    if options.background:
        duration_s = max(60.0, num_programs / rate if rate else 0.0)
        num_chats = math.ceil(duration_s * options.background)
        streams.append(Stream("background", _chat, num_chats, options.background))
    return heapq.merge(*(_programs(stream, options) for stream in streams), key=lambda program: program.arrival_s)


def _programs(stream: Stream, options: WorkloadOptions) -> Iterator[ProgramSpec]:
    draw = _Draw(f"{stream.name}/{options.seed}", options.scale)
    clock = random.Random(f"{stream.name}/{options.seed}/arrivals")
    tenants = [f"t{i}" for i in range(len(options.tenants))]
    now_s = 0.0
    for i in range(stream.num_programs):
        if stream.rate:
            now_s += clock.expovariate(stream.rate)
        tenant = clock.choices(tenants, options.tenants)[0]
        yield replace(stream.shape(draw, f"{stream.name}-{i}"), arrival_s=now_s, tenant=tenant)
