"""What a draft costs: the ridge from the times of steps, and from a real model."""

import pytest

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.ridge import RidgeEstimate
from macaw_server.engine.types import EngineRequest, SamplingParams


def line(fixed: float, row: float, *rows: int) -> list[tuple[int, float]]:
    return [(n, fixed + row * n) for n in rows]


@pytest.mark.parametrize(("fixed", "row"), [(8.0, 1.0), (100.0, 2.0), (3.0, 4.0)])
def test_the_first_two_steps_give_the_line(fixed: float, row: float) -> None:
    assert RidgeEstimate(*line(fixed, row, 1, 9)).ridge == pytest.approx(fixed / row)


def test_limits() -> None:
    assert RidgeEstimate((1, 1.0), (9, 1.0)).ridge == 512, "rows for nothing"
    assert RidgeEstimate((1, 1.0), (9, 0.9)).ridge == 512, "noise"
    assert RidgeEstimate((1, 1.0), (9, 90.0)).ridge == 0.5


def test_later_steps_move_it() -> None:
    estimate = RidgeEstimate(*line(8, 1, 1, 9))
    for rows, seconds in line(8, 4, *[1, 9, 16] * 60):
        estimate.observe(rows, seconds)
    assert estimate.ridge == pytest.approx(2, rel=0.2)
    for rows, seconds in line(8, 1, *[1, 9, 16] * 60):
        estimate.observe(rows, seconds)
    assert estimate.ridge == pytest.approx(8, rel=0.15)


def test_steps_that_are_all_alike_still_leave_a_line() -> None:
    estimate = RidgeEstimate(*line(8, 1, 1, 9))
    for _ in range(500):
        estimate.observe(8, 16.0)
    assert estimate.ridge == pytest.approx(8)
    for _ in range(500):
        estimate.observe(8, 40.0)
    assert estimate.ridge < 4, "rows cost more than was thought"


def test_a_disturbed_step_does_not_count_in_full() -> None:
    estimate = RidgeEstimate(*line(8, 1, 1, 9))
    for seconds in [17.0] * (RidgeEstimate.EVERY - 1) + [1e6]:
        estimate.observe(9, seconds)
    assert 1 < estimate.ridge < 8


def test_an_engine_measures_before_it_serves_and_while_it_does() -> None:
    config = {"dtype": "float32", "max_model_len": 64, "speculative_tokens": 4}
    seen: list[str] = []
    core = EngineCore(EngineConfig(**config), seen.append)
    assert "measuring what a draft costs" in seen
    before = core.ridge
    assert 0.5 <= before <= 512
    core.add(EngineRequest("r", [5, 6, 7], SamplingParams(max_tokens=20, temperature=0)))
    while core.has_work:
        core.step()
    assert core.ridge != before

    seen.clear()
    core = EngineCore(EngineConfig(**config, speculative_ridge=7), seen.append)
    assert core.ridge == 7
    assert "measuring what a draft costs" not in seen
