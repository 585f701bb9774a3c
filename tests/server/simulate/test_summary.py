from __future__ import annotations

import math

import pytest

from macaw_server.scheduler import Coefficients, StepTimeModel
from macaw_server.simulate.records import CallRecord, ProgramRecord, RunResult
from macaw_server.simulate.summary import Percentiles, summarize
from macaw_server.simulate.virtual import SimulationConfig
from macaw_server.workloads import CallSpec, ProgramSpec, Text

STEP_TIME = StepTimeModel(Coefficients(fixed=1000.0, token=0.0, sample=0.0, kv_token=0.0, score=0.0))
"""A step takes a second, so a call of one chunk and n tokens takes n seconds alone."""


def record(name: str, latency_s: float, *, tenant: str = "t0", app: str = "app", **fields: object) -> ProgramRecord:
    spec = ProgramSpec(
        name,
        app,
        1.0,
        (CallSpec("a", (Text("x", 100),), 2),),
        ("a",),
        tenant=tenant,
        deadline_s=fields.pop("deadline_s", None),  # type: ignore[arg-type]
    )
    end_s = 1.0 + latency_s
    call = CallRecord(100, 2, 1.0, 1.0, 1.0 + latency_s / 2, end_s, cached_tokens=30, shared_tokens=60)
    return ProgramRecord(spec, {"a": call}, end_s, **fields)  # type: ignore[arg-type]


def test_the_numbers() -> None:
    result = RunResult([record("a", 2.0), record("b", 8.0, app="other"), record("c", 12.0)], duration_s=20.0)
    result.num_scheduled, result.decision_s = 3, 300e-6
    summary = summarize(result, SimulationConfig(), STEP_TIME, slo=5.0)
    assert summary.tokens_per_s == pytest.approx(6 / 20)
    assert summary.programs_per_s == pytest.approx(3 / 20)
    assert (summary.hit_share, summary.ideal_hit_share) == (0.3, 0.6)
    assert summary.us_per_call == pytest.approx(100)
    assert summary.all.latency_s == Percentiles(8.0, 12.0, 12.0)
    assert summary.all.slowdown == Percentiles(4.0, 6.0, 6.0)
    assert summary.all.ttft_ms.p50 == pytest.approx(4000)
    assert summary.all.token_ms.p50 == pytest.approx(4000)
    assert summary.all.slo_share == pytest.approx(2 / 3)
    assert {name: group.num_programs for name, group in summary.apps.items()} == {"app": 2, "other": 1}


def test_failures_and_deadlines() -> None:
    programs = [
        record("a", 50.0, deadline_s=60.0),  # slow, and in time
        record("b", 3.0, deadline_s=2.5),
        record("c", 1.0, error="cancelled"),
    ]
    summary = summarize(RunResult(programs, duration_s=60.0), SimulationConfig(), STEP_TIME, slo=5.0)
    assert (summary.all.num_programs, summary.all.num_failed) == (3, 1)
    assert summary.all.slo_share == pytest.approx(1 / 3)
    assert summary.all.latency_s.p50 == 50.0


def test_fairness_between_tenants() -> None:
    def fairness(*latencies: float) -> float:
        programs = [record(f"{i}", latency_s, tenant=f"t{i}") for i, latency_s in enumerate(latencies)]
        return summarize(RunResult(programs, duration_s=1.0), SimulationConfig(), STEP_TIME, slo=5.0).fairness

    assert fairness(4.0, 4.0) == 1.0
    assert fairness(1e-9, 1e-9, 30.0) == pytest.approx(1 / 3)


def test_percentiles_of_nothing() -> None:
    assert math.isnan(Percentiles.of([]).p50)
