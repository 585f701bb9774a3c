from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macaw_server.scheduler import Coefficients, StepTimeModel
from macaw_server.simulate.records import ProgramRecord, RunResult
from macaw_server.simulate.summary import alone_s
from macaw_server.simulate.virtual import Simulation, SimulationConfig
from macaw_server.workloads import WORKLOADS, CallSpec, Output, ProgramSpec, Text, WorkloadOptions, make_workload

STEP_TIME = StepTimeModel(Coefficients(fixed=10.0, token=1.0, sample=0.0, kv_token=0.0, score=0.0))
"""A prompt of n tokens takes 10 + n ms, a token of the answer 11 ms."""
CONFIG = SimulationConfig(num_pages=500, page_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=1000)


def simulate(*programs: ProgramSpec, **changes: object) -> dict[str, ProgramRecord]:
    result = Simulation(replace(CONFIG, **changes), STEP_TIME, programs).run()  # type: ignore[arg-type]
    return {record.spec.id: record for record in result.programs}


def program(*calls: CallSpec, name: str = "p", **fields: object) -> ProgramSpec:
    defaults: dict[str, object] = {"app": "app", "arrival_s": 0.0, "targets": (calls[-1].id,)}
    return ProgramSpec(name, calls=calls, **{**defaults, **fields})  # type: ignore[arg-type]


def call(name: str, *parts: Text | Output, output_len: int = 3, **fields: object) -> CallSpec:
    return CallSpec(name, parts or (Text(name, 20),), output_len, **fields)  # type: ignore[arg-type]


class TestTimes:
    def test_a_call_takes_its_steps(self) -> None:
        record = simulate(program(call("a"), arrival_s=2.0))["p"]
        a = record.calls["a"]
        assert (a.prompt_len, a.output_len, a.cached_tokens) == (20, 3, 0)
        assert (a.ready_s, a.started_s) == (2.0, 2.0)
        assert a.first_token_s == pytest.approx(2.030)
        assert record.latency_s == pytest.approx(0.030 + 2 * 0.011)

    def test_a_consumer_reads_its_producers_answer_from_the_cache(self) -> None:
        record = simulate(program(call("a", output_len=20), call("b", Text("a", 20), Output("a"), Text("x", 1))))["p"]
        b = record.calls["b"]
        assert b.ready_s == record.calls["a"].ended_s
        assert b.prompt_len == 41
        assert b.cached_tokens == 36  # the last token of the answer was not run, so its page is not there
        assert b.shared_tokens == 40

    def test_client_time_and_round_trips(self) -> None:
        spec = program(call("a"), call("b", Output("a"), gap_s=1.0))
        record = simulate(spec, rtt_s=0.2)["p"]
        a, b = record.calls.values()
        assert a.ready_s == pytest.approx(0.1)
        assert b.ready_s == pytest.approx(a.ended_s + 0.1 + 1.0 + 0.1)
        assert record.ended_s == pytest.approx(b.ended_s + 0.1)

    def test_a_client_without_programs_pays_for_each_hop(self) -> None:
        chain = program(call("a"), call("b", Output("a")), call("c", Output("b")))
        of_program = simulate(chain, rtt_s=0.1)["p"].latency_s
        of_requests = simulate(chain, rtt_s=0.1, client="requests")["p"].latency_s
        assert of_requests == pytest.approx(of_program + 2 * 0.1)

    def test_what_nobody_reads_is_waited_for(self) -> None:
        record = simulate(program(call("a"), call("b", after=("a",))))["p"]
        assert record.calls["b"].ready_s == record.calls["a"].ended_s

    def test_all_targets_are_waited_for(self) -> None:
        record = simulate(program(call("a", output_len=9), call("b"), targets=("a", "b")))["p"]
        assert record.ended_s == record.calls["a"].ended_s > record.calls["b"].ended_s

    def test_alone_is_what_a_program_takes_on_an_idle_engine(self) -> None:
        spec = program(call("a", output_len=5), call("b", Output("a"), Text("x", 99), gap_s=0.5), arrival_s=1.0)
        for config in (CONFIG, replace(CONFIG, rtt_s=0.1, client="requests")):
            result = Simulation(config, STEP_TIME, [spec]).run()
            # A step behind its deps, `alone_s` counts one round trip.
            hops_s = 0.1 if config.rtt_s else 0.0
            assert result.programs[0].latency_s == pytest.approx(alone_s(spec, config, STEP_TIME) + hops_s)

    def test_engines_work_at_the_same_time(self) -> None:
        specs = [program(call("a", Text(f"{i}", 60)), name=f"p{i}") for i in range(4)]
        alone = simulate(specs[0])["p0"].latency_s
        on_four = simulate(*specs, num_engines=4)
        assert {record.latency_s for record in on_four.values()} == {alone}
        assert max(record.latency_s for record in simulate(*specs).values()) > 2 * alone


class TestFailures:
    @pytest.mark.parametrize(
        ("switch", "cached"),
        [({}, [0, 40, 40]), ({"single_flight": False}, [0, 0, 40]), ({"prefix_caching": False}, [0, 0, 0])],
    )
    def test_what_is_found_of_a_prefix_that_two_need_at_once(
        self, switch: dict[str, object], cached: list[int]
    ) -> None:
        programs = [
            program(call("a", Text("prefix", 40), Text(name, 5)), name=name, arrival_s=arrival_s)
            for name, arrival_s in (("first", 0.0), ("second", 0.0), ("later", 1.0))
        ]
        found = simulate(*programs, **switch)
        assert [found[spec.id].calls["a"].cached_tokens for spec in programs] == cached

    @pytest.mark.parametrize(("placement", "cached"), [("affinity", 2000), ("least-loaded", 0)])
    def test_a_call_follows_its_prefix_or_the_number_of_calls(self, placement: str, cached: int) -> None:
        programs = [
            program(call("a", Text("prefix", 2000), Text(name, 5)), name=name, arrival_s=arrival_s)
            for name, arrival_s in (("first", 0.0), ("second", 9.0))
        ]
        found = simulate(
            *programs,
            placement=placement,
            num_engines=2,
            num_pages=1000,
            max_num_batched_tokens=512,
            max_model_len=3000,
        )
        assert found["second"].calls["a"].cached_tokens == cached

    @pytest.mark.parametrize("task_groups", [True, False])
    def test_without_task_groups_a_chat_waits_for_the_calls_before_it(self, task_groups: bool) -> None:
        maps = [call(f"m{i}", Text(f"m{i}", 200)) for i in range(4)]
        reduce = call("r", *(Output(each.id) for each in maps))
        chat = program(call("a"), name="chat", arrival_s=0.001)
        waits = simulate(program(*maps, reduce, name="map"), chat, task_groups=task_groups, max_num_seqs=2)
        a = waits["chat"].calls["a"]
        assert (a.started_s - a.ready_s < 0.25) == task_groups  # a call before it takes 0.25 s

    def test_a_prompt_that_is_too_long_fails_its_program_only(self) -> None:
        records = simulate(program(call("a", Text("x", 2000)), call("b", Output("a"))), program(call("a"), name="q"))
        assert records["p"].error == "upstream_failed"
        assert list(records["p"].calls) == ["a"]
        assert records["q"].error is None

    def test_a_deadline_that_passes_frees_what_the_program_held(self) -> None:
        late = program(call("a", output_len=500), deadline_s=0.1)
        records = simulate(late, program(call("q"), name="q", arrival_s=0.2))
        assert records["p"].error == "deadline_exceeded"
        assert records["p"].ended_s == pytest.approx(0.1)
        assert records["q"].latency_s == pytest.approx(simulate(program(call("a")))["p"].latency_s)


def fingerprint(result: RunResult) -> list[object]:
    return [(r.spec.id, r.error, r.ended_s, tuple(map(repr, r.calls.items()))) for r in result.programs]


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("client", ["programs", "requests"])
def test_the_seed_is_the_run(name: str, client: str) -> None:
    options = WorkloadOptions(scale=0.01, num_programs=3, tenants=(2.0, 1.0))
    config = replace(CONFIG, num_engines=2, num_pages=4000, max_model_len=8000, client=client)  # type: ignore[arg-type]
    first, second = (Simulation(config, STEP_TIME, make_workload(name, options)).run() for _ in range(2))
    assert fingerprint(first) == fingerprint(second)
    assert all(record.error is None for record in first.programs)


@st.composite
def programs(draw: st.DrawFn) -> list[ProgramSpec]:
    """A few programs of a few calls that share texts, with gaps."""
    specs = []
    for i in range(draw(st.integers(1, 5))):
        calls: list[CallSpec] = []
        for j in range(draw(st.integers(1, 5))):
            read = draw(st.lists(st.sampled_from([c.id for c in calls]), max_size=2, unique=True)) if calls else []
            length = draw(st.integers(1, 40))
            parts = [Text(draw(st.sampled_from(["s", f"{i}/{j}"])) + f"/{length}", length), *map(Output, read)]
            gap_s = draw(st.sampled_from([0.0, 0.0, 0.05]))
            calls.append(CallSpec(f"c{j}", tuple(parts), draw(st.integers(1, 12)), gap_s=gap_s))
        read_by_others = {dep for c in calls for dep in c.deps}
        targets = tuple(c.id for c in calls if c.id not in read_by_others)
        arrival_s = draw(st.floats(0, 0.3))
        specs.append(
            ProgramSpec(f"p{i}", "app", arrival_s, tuple(calls), targets, tenant=draw(st.sampled_from(["x", "y"])))
        )
    return sorted(specs, key=lambda spec: spec.arrival_s)


@settings(deadline=None, max_examples=60)
@given(
    programs(),
    st.sampled_from(["app", "fcfs"]),
    st.integers(1, 3),
    st.sampled_from(["programs", "requests"]),
    st.sampled_from([0.0, 0.03]),
    st.integers(60, 90),
)
def test_every_program_ends_in_its_order(
    specs: list[ProgramSpec], policy: str, num_engines: int, client: str, rtt_s: float, num_pages: int
) -> None:
    config = replace(
        CONFIG,
        policy=policy,
        num_engines=num_engines,
        client=client,
        rtt_s=rtt_s,
        num_pages=num_pages,  # type: ignore[arg-type]
    )
    result = Simulation(config, STEP_TIME, specs).run()
    assert sorted(record.spec.id for record in result.programs) == sorted(spec.id for spec in specs)
    for record in result.programs:
        assert record.error is None
        prompt_lens, known = record.spec.prompt_lens(), {spec.id: spec for spec in record.spec.calls}
        assert record.calls.keys() == known.keys()
        for name, done in record.calls.items():
            assert (done.prompt_len, done.output_len) == (prompt_lens[name], known[name].output_len)
            assert 0 <= done.cached_tokens < done.prompt_len
            assert done.shared_tokens < done.prompt_len
            assert done.ready_s <= done.started_s < done.first_token_s <= done.ended_s <= record.ended_s
            before = max((record.calls[dep].ended_s for dep in known[name].deps), default=record.spec.arrival_s)
            assert done.ready_s >= before + known[name].gap_s - 1e-9
    assert result.num_scheduled == sum(len(spec.calls) for spec in specs)


def test_more_pages_never_evict_and_less_do() -> None:
    options = WorkloadOptions(scale=0.02, num_programs=12)
    config = replace(CONFIG, max_model_len=8000)
    few, many = (
        Simulation(replace(config, num_pages=pages), STEP_TIME, make_workload("multi-agent", options)).run()
        for pages in (200, 50_000)
    )
    assert many.num_evicted_pages == many.num_preemptions == 0
    assert few.num_evicted_pages > 0
    assert few.duration_s > many.duration_s
