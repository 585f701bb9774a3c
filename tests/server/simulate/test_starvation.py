"""No starvation: the bound on waiting of docs/scheduling.md, in virtual time, whatever one tenant asks for."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macaw_server.scheduler import AGEING_S, AppPolicy, Coefficients, StepTimeModel
from macaw_server.simulate.records import CallRecord, RunResult
from macaw_server.simulate.virtual import Simulation, SimulationConfig
from macaw_server.workloads import CallSpec, Output, ProgramSpec, Text

TOKEN_MS = 100.0
"""A slow engine, so that a minute is a few hundred tokens."""


@dataclass(frozen=True)
class Load:
    """One tenant sends ten times what the engine can do, the others a part of it each.

    Attributes:
        weights: By tenant; the first one is the greedy one.
        shares: Of the engine's tokens, that the others ask for.
        seconds: For how long.
        fixed_ms: Of a step.
        num_seqs, num_tokens, num_pages: Limits of the engine.
        seed: Of lengths, arrivals and shapes.
    """

    weights: tuple[float, ...]
    shares: tuple[float, ...]
    seconds: float = 60.0
    fixed_ms: float = 0.0
    num_seqs: int = 2
    num_tokens: int = 16
    num_pages: int = 4000
    seed: int = 0

    def programs(self) -> list[ProgramSpec]:
        """Of one to three calls, of all classes, some with a common prefix."""
        rng, specs = random.Random(self.seed), []
        for tenant, (weight, share) in enumerate(zip(self.weights, (10.0, *self.shares), strict=True)):
            now_s = rng.expovariate(share / 2.8)
            while now_s < self.seconds:
                name, calls = f"t{tenant}/{len(specs)}", list[CallSpec]()
                for i in range(rng.choice([1, 1, 2, 3])):
                    own = Text(rng.choice(["shared", f"{name}/{i}"]), rng.randint(1, 12))
                    read = (Output(rng.choice(calls).id),) if calls and rng.random() < 0.7 else ()
                    output_len = 40 if tenant and rng.random() < 0.03 else rng.choice([1, 3, 6, 6])
                    calls.append(CallSpec(f"c{i}", (own, *read), output_len))
                read_by_others = {dep for call in calls for dep in call.deps}
                targets = tuple(call.id for call in calls if call.id not in read_by_others)
                objective = rng.choice(["latency", "throughput"])
                more = {"tenant": f"t{tenant}", "tenant_weight": weight, "objective": objective}
                specs.append(ProgramSpec(name, "app", now_s, tuple(calls), targets, **more))  # type: ignore[arg-type]
                now_s += rng.expovariate(share / 2.8)  # programs per second; one has 28 tokens in the mean
        return sorted(specs, key=lambda spec: spec.arrival_s)

    def run(self, policy: str = "app") -> RunResult:
        """On one engine."""
        config = SimulationConfig(
            policy=policy,
            num_pages=self.num_pages,
            page_size=4,
            max_num_seqs=self.num_seqs,
            max_num_batched_tokens=max(self.num_tokens, self.num_seqs),
            max_model_len=1000,
        )
        step_time = StepTimeModel(Coefficients(self.fixed_ms, TOKEN_MS, 0.0, 0.0, 0.0))
        return Simulation(config, step_time, self.programs()).run()


def service(call: CallRecord) -> float:
    return call.prompt_len + 2 * call.output_len


def late(load: Load, result: RunResult) -> list[str]:
    """Calls that have waited, or taken, longer than the bound allows.

    From when it is due on, a call waits for what its tenant asked for before, and for what holds the batch by then;
    other tenants get their share of the engine meanwhile, and what they may be ahead: two batches of the largest calls.
    The engine does a token a step at least, and what is preempted it may have to do again. Who is due and has begun
    gets a token in every step.
    """
    calls: dict[str, list[CallRecord]] = {}
    for record in result.programs:
        assert record.error is None
        calls.setdefault(record.spec.tenant, []).extend(record.calls.values())
    everything = [call for of_tenant in calls.values() for call in of_tenant]
    largest = max(map(service, everything))
    batch = load.num_seqs * largest
    again_ms = result.num_preemptions * largest * TOKEN_MS
    step_ms = load.fixed_ms + TOKEN_MS * max(load.num_tokens, load.num_seqs)
    found = []
    for tenant, of_tenant in calls.items():
        weight = load.weights[int(tenant[1:])]
        for call in of_tenant:
            due_s = call.ready_s + AGEING_S
            if call.ended_s <= due_s:
                continue
            before = [c for c in of_tenant if c is not call and c.ready_s <= call.ready_s and c.ended_s > due_s]
            own = (sum(map(service, before)) + batch) / weight
            units = sum(each * (own + 2 * batch / min(load.weights)) for each in load.weights)
            bound_s = AGEING_S + (units * (load.fixed_ms + TOKEN_MS) + again_ms) / 1000
            if call.started_s - call.ready_s > bound_s:
                found.append(f"a call of {tenant} waited {call.started_s - call.ready_s:.0f} s, allowed {bound_s:.0f}")
            if call.ended_s - call.ready_s > bound_s + (call.prompt_len + call.output_len) * step_ms / 1000:
                found.append(f"a call of {tenant} took {call.ended_s - call.ready_s:.0f} s")
    return found


@st.composite
def loads(draw: st.DrawFn) -> Load:
    num_others = draw(st.integers(1, 3))
    weights = [draw(st.sampled_from([1.0, 2.0, 4.0])) for _ in range(1 + num_others)]
    shares = [draw(st.sampled_from([0.1, 0.3, 0.6])) / num_others for _ in range(num_others)]
    return Load(
        tuple(weights),
        tuple(shares),
        seconds=draw(st.sampled_from([20.0, 60.0])),
        fixed_ms=draw(st.sampled_from([0.0, 100.0, 300.0])),
        num_seqs=draw(st.sampled_from([2, 4])),
        num_tokens=draw(st.sampled_from([4, 16, 64])),
        num_pages=draw(st.sampled_from([60, 4000])),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(loads())
def test_nobody_waits_longer_than_the_bound(load: Load) -> None:
    assert not late(load, load.run())


HARD = [
    Load((1.0, 2.0), (0.3,), seed=3),
    Load((1.0, 1.0), (0.6,), fixed_ms=100.0, seed=4),
    Load((2.0, 1.0, 1.0), (0.3, 0.3), seed=3),
]


@pytest.mark.parametrize("load", HARD)
def test_first_come_first_served_breaks_it(load: Load) -> None:
    assert late(load, load.run("fcfs"))
    assert not late(load, load.run())


@pytest.mark.parametrize("load", HARD)
def test_it_takes_both_ageing_and_shares(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(AppPolicy, "ageing_s", math.inf)
        assert late(load, load.run()), "without ageing"
    monkeypatch.setattr(AppPolicy, "lane", lambda self, sequence: "")
    assert late(load, load.run()), "all tenants in one lane"


def test_one_long_call_of_a_tenant_does_not_let_a_newcomer_overtake_all_others() -> None:
    """A tenant with a single call cannot use its share; the newcomer's is counted from those who wait."""

    def calls(tenant: str, number: int, arrival_s: float, output_len: int = 10) -> list[ProgramSpec]:
        names = [f"{tenant}/{i}" for i in range(number)]
        one = [CallSpec("c", (Text(name, 10),), output_len) for name in names]
        return [
            ProgramSpec(name, tenant, arrival_s, (c,), ("c",), tenant=tenant)
            for name, c in zip(names, one, strict=True)
        ]

    programs = [*calls("long", 1, 0.0, 3000), *calls("busy", 600, 0.0), *calls("late", 300, 100.0)]
    config = SimulationConfig(max_num_seqs=4, max_num_batched_tokens=64)
    result = Simulation(config, StepTimeModel(Coefficients(100.0, 0.001, 0.0, 0.0, 0.0)), programs).run()
    ends = {name: [r.ended_s for r in result.programs if r.spec.tenant == name] for name in ("busy", "late")}
    in_time = {name: sum(100.0 < end_s <= 150.0 for end_s in of) for name, of in ends.items()}
    assert abs(in_time["busy"] - in_time["late"]) <= 6, in_time
