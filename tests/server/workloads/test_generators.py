from __future__ import annotations

import statistics
from collections import Counter
from itertools import islice

import pytest

from macaw_server.workloads import WORKLOADS, Output, ProgramSpec, Text, WorkloadOptions, make_workload


def made(name: str, **options: object) -> list[ProgramSpec]:
    return list(make_workload(name, WorkloadOptions(**options)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WORKLOADS)
class TestAll:
    def test_the_seed_is_the_workload(self, name: str) -> None:
        assert made(name, seed=3, background=0.5) == made(name, seed=3, background=0.5)
        assert made(name, seed=3) != made(name, seed=4)

    def test_programs_are_sound_and_in_order(self, name: str) -> None:
        programs = made(name, background=0.2)
        assert [p.arrival_s for p in programs] == sorted(p.arrival_s for p in programs)
        assert len({p.id for p in programs}) == len(programs)
        for program in programs:
            known: set[str] = set()
            for call in program.calls:
                assert call.id not in known
                assert known.issuperset(call.deps)
                assert call.output_len >= 1
                known.add(call.id)
            assert known.issuperset(program.targets)
            assert min(program.prompt_lens().values()) >= 1

    def test_lengths_scale_and_shapes_stay(self, name: str) -> None:
        full, tenth = made(name), made(name, scale=0.1)
        assert [[c.id for c in p.calls] for p in full] == [[c.id for c in p.calls] for p in tenth]
        lens = [sum(sum(p.prompt_lens().values()) for p in programs) for programs in (full, tenth)]
        assert lens[1] == pytest.approx(0.1 * lens[0], rel=0.05)

    def test_nothing_is_made_before_it_is_asked_for(self, name: str) -> None:
        endless = make_workload(name, WorkloadOptions(num_programs=10**12, rate=1.0))
        assert len(list(islice(endless, 3))) == 3

    def test_programs_end_at_the_smallest_scale(self, name: str) -> None:
        assert min(c.output_len for p in made(name, scale=1e-6) for c in p.calls) == 1


def prompt_lens(programs: list[ProgramSpec], prefix: str = "") -> list[int]:
    return [n for p in programs for call, n in p.prompt_lens().items() if call.startswith(prefix)]


class TestShapes:
    def test_copilot_has_the_lengths_of_the_paper(self) -> None:
        programs = made("copilot", num_programs=2000)
        lens = prompt_lens(programs)
        assert 5224 <= min(lens) <= max(lens) <= 7492
        assert statistics.mean(lens) == pytest.approx(6167, rel=0.01)
        assert {p.calls[0].parts[0] for p in programs} == {Text("copilot", 5107)}

    def test_multi_agent_has_the_lengths_of_the_paper(self) -> None:
        programs = made("multi-agent", num_programs=20)
        for prefix, length in {"architect": 182, "code": 2991, "review": 3717, "revise": 4175}.items():
            assert statistics.mean(prompt_lens(programs, prefix)) == pytest.approx(length, rel=0.02)
        outputs = [c.output_len for p in programs for c in p.calls]
        assert (min(outputs) >= 172, max(outputs)) == (True, 822)

    def test_map_reduce_reads_the_document_once(self) -> None:
        for program in made("map-reduce"):
            *maps, reduce = program.calls
            chunks = [part for call in maps for part in call.parts if isinstance(part, Text) and part.key != "map"]
            assert sum(chunk.length for chunk in chunks) == 20_000
            assert reduce.deps == tuple(call.id for call in maps)
            assert program.targets == ("reduce",)

    def test_chain_summary_is_a_chain(self) -> None:
        for program in made("chain-summary"):
            for before, call in zip(program.calls, program.calls[1:], strict=False):
                assert call.parts[-1] == Output(before.id)

    def test_agents_reread_what_was_said(self) -> None:
        programs = made("agents")
        assert all(10 <= len(p.calls) <= 40 for p in programs)
        for before, call in ((a, b) for p in programs for a, b in zip(p.calls, p.calls[1:], strict=False)):
            assert call.parts[: len(before.parts)] == before.parts
            assert 0.1 <= call.gap_s <= 10
        shared = [1 - b / a for p in programs for a, b in [_last_two(p)]]
        assert statistics.mean(shared) < 0.1

    def test_mixed_has_chats_and_programs(self) -> None:
        programs = made("mixed")
        assert Counter(p.app for p in programs) == {"chat": 40, "map-reduce": 9}
        assert max(p.arrival_s for p in programs) == pytest.approx(40, rel=0.5)


def _last_two(program: ProgramSpec) -> tuple[int, int]:
    *_, before, last = program.prompt_lens().values()
    return last, before


class TestOptions:
    def test_number_and_rate(self) -> None:
        programs = made("gpts", num_programs=1000, rate=50.0)
        assert len(programs) == 1000
        assert programs[-1].arrival_s == pytest.approx(20, rel=0.2)
        assert {p.arrival_s for p in made("gpts", rate=0.0)} == {0.0}

    def test_background_comes_on_top(self) -> None:
        programs = made("map-reduce", background=2.0)
        assert Counter(p.app for p in programs) == {"chat": 120, "map-reduce": 9}

    def test_tenants_have_their_shares(self) -> None:
        tenants = Counter(p.tenant for p in made("gpts", num_programs=3000, tenants=(10.0, 1.0)))
        assert tenants["t0"] / tenants["t1"] == pytest.approx(10, rel=0.2)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scale": 0.0}, "must be above 0"),
            ({"num_programs": 0}, "at least 1"),
            ({"rate": -1.0}, "at least 0"),
            ({"tenants": ()}, "above 0"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            WorkloadOptions(**options)  # type: ignore[arg-type]

    def test_unknown_workload(self) -> None:
        with pytest.raises(ValueError, match="No workload 'nope'; choose one of agents, chain-summary"):
            make_workload("nope", WorkloadOptions())
