"""Traces of calls, one JSON object a line, in the format of Mooncake (Qin et al., FAST 2025) and a little more.

``{"timestamp": 1500, "input_length": 1600, "output_length": 50, "hash_ids": [3, 4, 9, 20]}``: milliseconds, tokens,
and one number for each block of 512 tokens of the prompt (the last one may be shorter); equal numbers are equal text.
Ours adds ``program_id``, ``node`` (name of the call in it) and ``deps`` (names of calls that it waits for), and where
it matters ``tenant``, ``app``, ``gap_ms`` (client time between the last of ``deps`` and the call), ``objective``,
``deadline_ms``, ``block_size`` (other than 512, the same in all lines) and ``answer_ids``: numbers of the blocks that
the answer fills behind the prompt, the first of which may begin with the prompt's end. So a prompt that goes on with
an answer is known as such. A program arrives with its earliest line; a call without ``deps`` comes at its own
timestamp, and one without ``program_id`` is a program of its own.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from macaw_server.workloads.types import CallSpec, Output, Part, ProgramSpec, Text

BLOCK_SIZE = 512
"""Tokens that one number of `hash_ids` stands for, where a trace does not say."""
_FIELDS = {
    "timestamp": (int, float),
    "input_length": int,
    "output_length": int,
    "hash_ids": list,
    "answer_ids": list,
    "block_size": int,
    "program_id": str,
    "node": str,
    "deps": list,
    "tenant": str,
    "app": str,
    "gap_ms": (int, float),
    "objective": str,
    "deadline_ms": (int, float),
}
_NEEDED = ("timestamp", "input_length", "output_length", "hash_ids")


class TraceError(ValueError):
    """A line of a trace that cannot be read; the message has its number."""


@dataclass(slots=True)
class _Growing:
    """A program whose lines are being read; all by name of the call.

    Attributes:
        lines: As they are.
        specs: Calls, less their gaps.
        bits: One for each call.
        before: Bits of the calls that it waits for, that these wait for, and so on.
        answers: Calls by the number of the first block of their answers.
    """

    lines: dict[str, dict[str, Any]] = field(default_factory=dict)
    specs: dict[str, CallSpec] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    answers: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def arrival_s(self) -> float:
        return min(float(line["timestamp"]) for line in self.lines.values()) / 1000


def read_trace(path: Path) -> list[ProgramSpec]:
    """The programs of a trace, in order of arrival; the first one arrives at 0.

    Raises:
        TraceError: A line is no such object, or its program is not sound.
        OSError: The file cannot be read.
    """
    programs: dict[str, _Growing] = {}
    block_size = None
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            line = _parsed(text, number)
            own_size = line.get("block_size", BLOCK_SIZE)
            if own_size != (block_size := block_size or own_size):
                raise TraceError(f"Line {number}: block_size is {own_size}, and {block_size} in the lines before.")
            program_id = line.get("program_id", f"line{number}")
            _add(programs.setdefault(program_id, _Growing()), program_id, line, number, block_size)
    if not programs:
        raise TraceError(f"{path} has no lines.")
    start_s = min(program.arrival_s for program in programs.values())
    specs = [_program(program_id, program, start_s) for program_id, program in programs.items()]
    return sorted(_merged(specs), key=lambda spec: spec.arrival_s)


def _add(program: _Growing, program_id: str, line: dict[str, Any], number: int, block_size: int) -> None:
    """Take up one call; its producers come first."""
    node = line.get("node", f"call{len(program.lines)}")
    deps = line.get("deps", ())
    unknown = [dep for dep in deps if dep not in program.lines]
    if unknown or node in program.lines:
        names = ", ".join(map(repr, unknown))
        what = f"waits for {names}, which no earlier line has" if unknown else "is the second line of that name"
        raise TraceError(f"Line {number}: call {node!r} of program {program_id!r} {what}.")
    blocks = _blocks(line, number, block_size)
    before = 0
    for dep in deps:
        before |= program.before[dep] | program.bits[dep]
    parts = _with_answer(program, before, line, blocks, block_size)
    read = {part.call for part in parts if isinstance(part, Output)}
    program.bits[node], program.before[node] = 1 << len(program.lines), before
    program.lines[node] = line
    program.specs[node] = CallSpec(node, parts, line["output_length"], tuple(dep for dep in deps if dep not in read))
    if answer_ids := line.get("answer_ids"):
        program.answers[answer_ids[0]].append(node)


def _with_answer(
    program: _Growing, before: int, line: dict[str, Any], blocks: tuple[Text, ...], block_size: int
) -> tuple[Part, ...]:
    """A prompt: that of the last call before it with whose answer it goes on, the answer, and the rest."""
    ids = line["hash_ids"]
    for node in (node for number in reversed(ids) for node in program.answers.get(number, ())):
        made = program.lines[node]
        begin, end = made["input_length"], made["input_length"] + made["output_length"]
        whole = [*made["hash_ids"][: begin // block_size], *made["answer_ids"]]
        if program.bits[node] & before and ids[: len(whole)] == whole and end <= line["input_length"]:
            first, used = divmod(end, block_size)
            rest = (Text(key, length - (used if i == 0 else 0)) for i, (key, length) in enumerate(blocks[first:]))
            return (*program.specs[node].parts, Output(node), *(text for text in rest if text.length))
    return blocks


def write_trace(programs: Iterable[ProgramSpec], path: Path, block_size: int = BLOCK_SIZE) -> None:
    """Write a workload as a trace: blocks that are equal, up to their place, get equal numbers.

    Sharing of less than a block is lost, as in any such trace, and so is where answers stand in prompts that do not
    begin with the prompt that they answer.
    """
    numbers: dict[object, int] = {}
    with path.open("w", encoding="utf-8") as file:
        for program in programs:
            for line in _lines(program, numbers, block_size):
                file.write(json.dumps(line) + "\n")


def _parsed(text: str, number: int) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as e:
        raise TraceError(f"Line {number} is not JSON: {e}.") from e
    if not isinstance(line, dict) or any(name not in line for name in _NEEDED):
        raise TraceError(f"Line {number} is not an object with {', '.join(_NEEDED)}: {text.strip()[:80]}.")
    for name, value in line.items():
        kind: Any = _FIELDS.get(name)
        if kind is None:
            raise TraceError(f"Line {number}: unknown field {name!r}; known ones: {', '.join(_FIELDS)}.")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TraceError(f"Line {number}: {name} is {value!r}.")
    if line["input_length"] < 1 or line["output_length"] < 1 or line["timestamp"] < 0 or line.get("gap_ms", 0) < 0:
        raise TraceError(f"Line {number}: lengths must be at least 1 and times at least 0: {text.strip()[:80]}.")
    if line.get("block_size", 1) < 1:
        raise TraceError(f"Line {number}: block_size is {line['block_size']}; it is at least 1.")
    if line.get("objective", "latency") not in ("latency", "throughput"):
        raise TraceError(f"Line {number}: objective is {line['objective']!r}; it is latency or throughput.")
    return line


def _blocks(line: dict[str, Any], number: int, block_size: int) -> tuple[Text, ...]:
    length, ids = line["input_length"], line["hash_ids"]
    needed = -(-length // block_size)
    if len(ids) != needed:
        raise TraceError(f"Line {number}: {length} tokens are {needed} blocks of {block_size}, not {len(ids)}.")
    if answer_ids := line.get("answer_ids"):
        filled = (length + line["output_length"]) // block_size - length // block_size
        if len(answer_ids) != filled:
            raise TraceError(
                f"Line {number}: {line['output_length']} tokens behind {length} fill {filled} blocks of {block_size}, "
                f"not {len(answer_ids)}."
            )
    return tuple(Text(f"block{hash_id}", min(block_size, length - i * block_size)) for i, hash_id in enumerate(ids))


def _program(program_id: str, program: _Growing, start_s: float) -> ProgramSpec:
    line = next(iter(program.lines.values()))
    arrival_s = program.arrival_s
    calls = [replace(call, gap_s=_gap_s(program.lines[node], arrival_s)) for node, call in program.specs.items()]
    read = {dep for call in calls for dep in call.deps}
    return ProgramSpec(
        id=program_id,
        app=line.get("app", "trace"),
        arrival_s=arrival_s - start_s,
        calls=tuple(calls),
        targets=tuple(call.id for call in calls if call.id not in read),
        objective=line.get("objective", "latency"),
        deadline_s=line["deadline_ms"] / 1000 if "deadline_ms" in line else None,
        tenant=line.get("tenant", "t0"),
    )


def _merged(specs: list[ProgramSpec]) -> list[ProgramSpec]:
    """Blocks that always come together, as one text: there are many, and what counts is where prompts part."""
    counts = Counter(part for spec in specs for call in spec.calls for part in call.parts)

    def merged(parts: tuple[Part, ...]) -> Iterator[Part]:
        for _, group in groupby(parts, lambda part: counts[part] if isinstance(part, Text) else 0):
            run = list(group)
            texts = [part for part in run if isinstance(part, Text)]  # all of them, or none
            if texts:
                yield Text(texts[0].key, sum(text.length for text in texts))
            else:
                yield from run

    return [
        replace(spec, calls=tuple(replace(call, parts=tuple(merged(call.parts))) for call in spec.calls))
        for spec in specs
    ]


def _gap_s(line: dict[str, Any], arrival_s: float) -> float:
    if "gap_ms" in line:
        return float(line["gap_ms"]) / 1000
    return 0.0 if line.get("deps") else float(line["timestamp"]) / 1000 - arrival_s


def _lines(program: ProgramSpec, numbers: dict[object, int], block_size: int) -> Iterator[dict[str, Any]]:
    calls = {call.id: call for call in program.calls}
    continued = {
        part.call
        for call in program.calls
        for i, part in enumerate(call.parts)
        if isinstance(part, Output) and call.parts[:i] == calls[part.call].parts
    }
    for call in program.calls:
        prompt = [_segment(part, program, calls) for part in call.parts]
        input_length = sum(length for _, length in prompt)
        hash_ids = _hash_ids(prompt, program.tenant, numbers, block_size)
        line: dict[str, Any] = {
            "timestamp": round(program.arrival_s * 1000, 3),
            "input_length": input_length,
            "output_length": call.output_len,
            "hash_ids": hash_ids,
            "program_id": program.id,
            "node": call.id,
            "deps": list(call.deps),
            "tenant": program.tenant,
            "app": program.app,
        }
        filled = (input_length + call.output_len) // block_size * block_size
        if call.id in continued and filled > input_length:
            answer = f"{program.id}/{call.id}/output", filled - input_length
            both = _hash_ids([*prompt, answer], program.tenant, numbers, block_size)
            line["answer_ids"] = both[input_length // block_size :]
        if block_size != BLOCK_SIZE:
            line["block_size"] = block_size
        if call.gap_s:
            line["gap_ms"] = round(call.gap_s * 1000, 3)
        if program.objective != "latency":
            line["objective"] = program.objective
        if program.deadline_s is not None:
            line["deadline_ms"] = round(program.deadline_s * 1000, 3)
        yield line


def _segment(part: Part, program: ProgramSpec, calls: dict[str, CallSpec]) -> tuple[str, int]:
    """Name and length of what stands in a prompt."""
    return part if isinstance(part, Text) else (f"{program.id}/{part.call}/output", calls[part.call].output_len)


def _hash_ids(segments: list[tuple[str, int]], tenant: str, numbers: dict[object, int], block_size: int) -> list[int]:
    """A number for each block: the same for the same pieces of the same texts behind the same block."""
    ids: list[int] = []
    pieces: list[tuple[str, int, int]] = []
    room, previous = block_size, -1
    for key, length in segments:
        start = 0
        while start < length:
            taken = min(room, length - start)
            pieces.append((key, start, taken))
            start += taken
            room -= taken
            if room == 0:
                previous = numbers.setdefault((tenant, previous, tuple(pieces)), len(numbers))
                ids.append(previous)
                pieces, room = [], block_size
    if pieces:
        ids.append(numbers.setdefault((tenant, previous, tuple(pieces)), len(numbers)))
    return ids
