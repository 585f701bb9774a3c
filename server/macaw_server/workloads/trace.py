"""Traces of calls, one JSON object a line, in the format of Mooncake (Qin et al., FAST 2025) and a little more.

``{"timestamp": 1500, "input_length": 1600, "output_length": 50, "hash_ids": [3, 4, 9, 20]}``: milliseconds, tokens,
and one number for each block of 512 tokens of the prompt (the last one may be shorter); equal numbers are equal text.
Ours adds ``program_id``, ``node`` (name of the call in it) and ``deps`` (names of calls that it waits for), and where
it matters ``tenant``, ``app``, ``gap_ms`` (client time between the last of ``deps`` and the call), ``objective`` and
``deadline_ms``. A program arrives with its first line; a call without ``deps`` comes at its own timestamp, and one
without ``program_id`` is a program of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from macaw_server.workloads.types import CallSpec, ProgramSpec, Text

BLOCK_SIZE = 512
"""Tokens that one number of `hash_ids` stands for."""
_FIELDS = {
    "timestamp": (int, float),
    "input_length": int,
    "output_length": int,
    "hash_ids": list,
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
    """A program whose lines are being read."""

    arrival_s: float
    line: dict[str, Any]
    calls: dict[str, CallSpec] = field(default_factory=dict)


def read_trace(path: Path) -> list[ProgramSpec]:
    """The programs of a trace, in order of arrival; the first one arrives at 0.

    Raises:
        TraceError: A line is no such object, or its program is not sound.
        OSError: The file cannot be read.
    """
    programs: dict[str, _Growing] = {}
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            line = _parsed(text, number)
            program_id = line.get("program_id", f"line{number}")
            timestamp_s = line["timestamp"] / 1000
            program = programs.setdefault(program_id, _Growing(timestamp_s, line))
            node = line.get("node", f"call{len(program.calls)}")
            deps = tuple(line.get("deps", ()))
            unknown = [dep for dep in deps if dep not in program.calls]
            if unknown or node in program.calls:
                names = ", ".join(map(repr, unknown))
                what = f"waits for {names}, which no earlier line has" if unknown else "is the second line of that name"
                raise TraceError(f"Line {number}: call {node!r} of program {program_id!r} {what}.")
            later_s = 0.0 if deps else max(0.0, timestamp_s - program.arrival_s)
            gap_s = line["gap_ms"] / 1000 if "gap_ms" in line else later_s
            program.calls[node] = CallSpec(node, _blocks(line, number), line["output_length"], deps, gap_s)
    if not programs:
        raise TraceError(f"{path} has no lines.")
    start_s = min(program.arrival_s for program in programs.values())
    specs = [_program(program_id, program, start_s) for program_id, program in programs.items()]
    return sorted(specs, key=lambda spec: spec.arrival_s)


def write_trace(programs: Iterable[ProgramSpec], path: Path) -> None:
    """Write a workload as a trace: blocks that are equal, up to their place, get equal numbers.

    Sharing of less than a block is lost, as in any such trace.
    """
    numbers: dict[object, int] = {}
    with path.open("w", encoding="utf-8") as file:
        for program in programs:
            for line in _lines(program, numbers):
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
    if line.get("objective", "latency") not in ("latency", "throughput"):
        raise TraceError(f"Line {number}: objective is {line['objective']!r}; it is latency or throughput.")
    return line


def _blocks(line: dict[str, Any], number: int) -> tuple[Text, ...]:
    length, ids = line["input_length"], line["hash_ids"]
    needed = -(-length // BLOCK_SIZE)
    if len(ids) != needed:
        raise TraceError(f"Line {number}: {length} tokens are {needed} blocks of {BLOCK_SIZE}, not {len(ids)}.")
    return tuple(Text(f"block{hash_id}", min(BLOCK_SIZE, length - i * BLOCK_SIZE)) for i, hash_id in enumerate(ids))


def _program(program_id: str, program: _Growing, start_s: float) -> ProgramSpec:
    line = program.line
    read = {dep for call in program.calls.values() for dep in call.deps}
    return ProgramSpec(
        id=program_id,
        app=line.get("app", "trace"),
        arrival_s=program.arrival_s - start_s,
        calls=tuple(program.calls.values()),
        targets=tuple(call_id for call_id in program.calls if call_id not in read),
        objective=line.get("objective", "latency"),
        deadline_s=line["deadline_ms"] / 1000 if "deadline_ms" in line else None,
        tenant=line.get("tenant", "t0"),
    )


def _lines(program: ProgramSpec, numbers: dict[object, int]) -> Iterator[dict[str, Any]]:
    lengths = {call.id: call.output_len for call in program.calls}
    for call in program.calls:
        segments = [
            (p.key, p.length) if isinstance(p, Text) else (f"{program.id}/{p.call}/output", lengths[p.call])
            for p in call.parts
        ]
        line: dict[str, Any] = {
            "timestamp": round(program.arrival_s * 1000, 3),
            "input_length": sum(length for _, length in segments),
            "output_length": call.output_len,
            "hash_ids": _hash_ids(segments, program.tenant, numbers),
            "program_id": program.id,
            "node": call.id,
            "deps": list(call.deps),
            "tenant": program.tenant,
            "app": program.app,
        }
        if call.gap_s:
            line["gap_ms"] = round(call.gap_s * 1000, 3)
        if program.objective != "latency":
            line["objective"] = program.objective
        if program.deadline_s is not None:
            line["deadline_ms"] = round(program.deadline_s * 1000, 3)
        yield line


def _hash_ids(segments: list[tuple[str, int]], tenant: str, numbers: dict[object, int]) -> list[int]:
    """A number for each block: the same for the same pieces of the same texts behind the same block."""
    ids: list[int] = []
    pieces: list[tuple[str, int, int]] = []
    room, previous = BLOCK_SIZE, -1
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
                pieces, room = [], BLOCK_SIZE
    if pieces:
        ids.append(numbers.setdefault((tenant, previous, tuple(pieces)), len(numbers)))
    return ids
