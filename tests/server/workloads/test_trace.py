from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from macaw_server.workloads import (
    BLOCK_SIZE,
    WORKLOADS,
    CallSpec,
    Output,
    Part,
    ProgramSpec,
    Text,
    TraceError,
    WorkloadOptions,
    make_workload,
    read_trace,
    write_trace,
)

LINE = {"timestamp": 1000, "input_length": 600, "output_length": 20, "hash_ids": [7, 8]}


def read(path: Path, *lines: object) -> list[ProgramSpec]:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return read_trace(path)


@pytest.mark.parametrize("name", WORKLOADS)
def test_written_and_read_again(name: str, tmp_path: Path) -> None:
    programs = list(make_workload(name, WorkloadOptions(tenants=(1.0, 1.0), num_programs=3, rate=2.0)))
    write_trace(programs, tmp_path / "trace")
    for before, after in zip(programs, read_trace(tmp_path / "trace"), strict=True):
        assert (after.id, after.tenant, after.app) == (before.id, before.tenant, before.app)
        assert after.arrival_s == pytest.approx(before.arrival_s - programs[0].arrival_s, abs=2e-6)
        assert set(after.targets) == set(before.targets)
        assert after.prompt_lens() == before.prompt_lens()
        for ours, theirs in zip(before.calls, after.calls, strict=True):
            assert (theirs.id, theirs.output_len) == (ours.id, ours.output_len)
            assert set(theirs.deps) == set(ours.deps)
            assert theirs.gap_s == pytest.approx(ours.gap_s, abs=1e-5)


def test_objective_and_deadline_are_kept(tmp_path: Path) -> None:
    call = CallSpec("a", (Text("x", 5),), 3)
    program = ProgramSpec("p", "app", 0.0, (call,), ("a",), "throughput", 2.5)
    write_trace([program], tmp_path / "trace")
    [found] = read_trace(tmp_path / "trace")
    assert (found.objective, found.deadline_s) == ("throughput", 2.5)


def test_equal_blocks_behind_equal_blocks_have_equal_numbers(tmp_path: Path) -> None:
    system = Text("system", 2 * BLOCK_SIZE + 10)
    first = CallSpec("a", (system, Text("x", BLOCK_SIZE)), 30)
    programs = [
        ProgramSpec("p", "app", 0.0, (first, CallSpec("b", (*first.parts, Output("a")), 1)), ("b",)),
        ProgramSpec("q", "app", 1.0, (CallSpec("a", (system, Text("y", BLOCK_SIZE)), 30),), ("a",)),
        ProgramSpec("r", "app", 1.0, (CallSpec("a", (Text("z", 1), system), 30),), ("a",)),
        ProgramSpec("s", "app", 1.0, (first,), ("a",), tenant="other"),
    ]
    write_trace(programs, tmp_path / "trace")
    lines = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    p_a, p_b, q, r, s = (line["hash_ids"] for line in lines)
    assert [len(ids) for ids in (p_a, p_b, q, r, s)] == [4, 4, 4, 3, 4]
    assert p_b[:3] == p_a[:3]  # the fourth block of b goes on with the answer
    assert p_b[3] != p_a[3]
    assert q[:2] == p_a[:2]
    assert q[2] != p_a[2]
    assert not {*r, *s} & {*p_a, *p_b, *q}


def test_mooncakes_own_lines_are_programs_of_one_call(tmp_path: Path) -> None:
    later = {**LINE, "timestamp": 3500, "hash_ids": [7, 9], "input_length": 1024}
    first, second = read(tmp_path / "t", later, LINE)
    assert (first.arrival_s, second.arrival_s) == (0.0, 2.5)
    assert first.calls[0].parts == (Text("block7", 512), Text("block8", 88))
    assert second.calls[0].parts == (Text("block7", 512), Text("block9", 512))
    assert first.targets == (first.calls[0].id,)


def test_a_call_without_deps_comes_at_its_own_time(tmp_path: Path) -> None:
    of = {"program_id": "p"}
    [program] = read(
        tmp_path / "t",
        {**LINE, **of, "node": "a"},
        {**LINE, **of, "node": "b", "timestamp": 1500},
        {**LINE, **of, "node": "c", "deps": ["a", "b"], "gap_ms": 50},
    )
    assert [call.gap_s for call in program.calls] == [0.0, 0.5, 0.05]
    assert program.targets == ("c",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Line 2 is not JSON"),
        ("[1]", "Line 2 is not an object with timestamp, input_length"),
        ({"timestamp": 1}, "Line 2 is not an object"),
        ({**LINE, "colour": 1}, "unknown field 'colour'"),
        ({**LINE, "input_length": "600"}, "input_length is '600'"),
        ({**LINE, "output_length": 0}, "at least 1"),
        ({**LINE, "hash_ids": [1]}, "600 tokens are 2 blocks of 512, not 1"),
        ({**LINE, "block_size": 0}, "block_size is 0; it is at least 1"),
        ({**LINE, "block_size": 300}, "block_size is 300, and 512 in the lines before"),
        ({**LINE, "answer_ids": [9]}, "20 tokens behind 600 fill 0 blocks of 512, not 1"),
        ({**LINE, "objective": "fast"}, "it is latency or throughput"),
        ({**LINE, "program_id": "p", "deps": ["x"]}, "waits for 'x', which no earlier line"),
        ({**LINE, "program_id": "p", "node": "a"}, "call 'a' of program 'p' is the second line of that name"),
    ],
)
def test_unsound_lines_are_refused_by_number(line: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=message):
        read(tmp_path / "t", {**LINE, "program_id": "p", "node": "a"}, line)


def test_blocks_are_one_text_up_to_where_prompts_part(tmp_path: Path) -> None:
    lines = [{**LINE, "input_length": 2048, "hash_ids": ids} for ids in ([1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 5, 7])]
    parts = [program.calls[0].parts for program in read(tmp_path / "t", *lines)]
    assert parts[0] == (Text("block1", 1024), Text("block3", 1024))
    assert parts[1] == (Text("block1", 1024), Text("block5", 512), Text("block6", 512))
    assert parts[2] == (*parts[1][:2], Text("block7", 512))


def test_a_program_arrives_with_its_earliest_line(tmp_path: Path) -> None:
    of = {"program_id": "p"}
    later = {**LINE, **of, "node": "a", "timestamp": 1800}
    [program] = read(tmp_path / "t", later, {**LINE, **of, "node": "b"})
    assert [(call.id, call.gap_s) for call in program.calls] == [("a", pytest.approx(0.8)), ("b", 0.0)]


class TestAnswersInPrompts:
    FIRST: ClassVar = {"timestamp": 0, "input_length": 20, "output_length": 30, "hash_ids": [0, 1], "block_size": 16}
    NEXT: ClassVar = {**FIRST, "input_length": 60, "hash_ids": [0, 2, 3, 4], "program_id": "p", "node": "b"}

    def parts(self, path: Path, first: dict[str, Any], **fields: object) -> tuple[Part, ...]:
        [program] = read(path, {**self.FIRST, "program_id": "p", "node": "a", **first}, {**self.NEXT, **fields})
        return program.calls[1].parts

    def test_a_prompt_goes_on_with_an_answer(self, tmp_path: Path) -> None:
        parts = self.parts(tmp_path / "t", {"answer_ids": [2, 3]}, deps=["a"])
        assert parts == (Text("block0", 20), Output("a"), Text("block4", 10))

    @pytest.mark.parametrize(
        "fields",
        [
            {},  # nobody says that the call has waited for the answer
            {"deps": ["a"], "hash_ids": [0, 2, 5, 4]},
            {"deps": ["a"], "hash_ids": [6, 2, 3, 4]},
            {"deps": ["a"], "input_length": 48, "hash_ids": [0, 2, 3]},  # its last tokens are missing
        ],
    )
    def test_or_does_not(self, fields: dict[str, Any], tmp_path: Path) -> None:
        parts = self.parts(tmp_path / "t", {"answer_ids": [2, 3]}, **fields)
        assert all(isinstance(part, Text) for part in parts)

    def test_of_two_equal_answers_it_is_the_one_before(self, tmp_path: Path) -> None:
        line = {**self.FIRST, "program_id": "p", "answer_ids": [2, 3]}
        lines = [{**line, "node": "a"}, {**line, "node": "other"}, {**self.NEXT, "deps": ["a"]}]
        [program] = read(tmp_path / "t", *lines)
        assert program.calls[2].parts[1] == Output("a")

    def test_a_workload_keeps_them(self, tmp_path: Path) -> None:
        [before] = make_workload("agents", WorkloadOptions(num_programs=1))
        write_trace([before], tmp_path / "t", block_size=16)
        [after] = read_trace(tmp_path / "t")
        assert [part for part in after.calls[-1].parts if isinstance(part, Output)] == [
            part for part in before.calls[-1].parts if isinstance(part, Output)
        ]


def test_an_empty_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="has no lines"):
        read(tmp_path / "t", "", "")
