"""What eviction by value does to whole applications, and that nothing is kept when they have ended."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macaw_server.kvcache import Eviction
from macaw_server.scheduler import StepTimeModel
from macaw_server.simulate.virtual import Simulation, SimulationConfig
from macaw_server.workloads import ProgramSpec, WorkloadOptions, make_workload
from server.simulate.test_virtual import CONFIG, STEP_TIME, programs


def found(name: str, eviction: Eviction, num_pages: int, **options: object) -> int:
    """Tokens that the programs of a workload's own app found in the cache, beside a stream of chats."""
    specs = make_workload(name, WorkloadOptions(scale=0.25, background=1.0, **options))  # type: ignore[arg-type]
    result = Simulation(SimulationConfig(num_pages=num_pages, eviction=eviction), StepTimeModel(), specs).run()
    assert result.num_evicted_pages > 0
    own = [record for record in result.programs if record.spec.app.startswith(name)]
    return sum(call.cached_tokens for record in own for call in record.calls.values())


@pytest.mark.parametrize(
    ("name", "num_pages", "options"),
    [("gpts", 300, {"num_programs": 32, "rate": 0.5}), ("agents", 700, {"num_programs": 12})],
)
def test_a_stream_of_chats_pushes_less_out(name: str, num_pages: int, options: dict[str, object]) -> None:
    assert found(name, "value", num_pages, **options) > 1.02 * found(name, "lru", num_pages, **options)


@settings(deadline=None, max_examples=30)
@given(programs(), st.sampled_from(["app", "fcfs"]), st.integers(1, 3), st.integers(60, 90), st.booleans())
def test_nothing_is_kept_when_all_have_ended(
    specs: list[ProgramSpec], policy: str, num_engines: int, num_pages: int, late: bool
) -> None:
    if late:  # a deadline cancels whatever runs
        specs = [replace(spec, deadline_s=0.1) for spec in specs]
    config = replace(CONFIG, policy=policy, num_engines=num_engines, num_pages=num_pages)
    simulation = Simulation(config, STEP_TIME, specs)
    simulation.run()
    for engine in simulation._engines:
        cache = engine.scheduler.kv_cache
        assert cache.retention is not None
        assert cache.retention.num_claims == 0
        assert cache.num_available == cache.num_pages
        cache.check()
