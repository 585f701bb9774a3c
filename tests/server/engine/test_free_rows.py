"""How many rows ride along with a decode: from the times of steps, and from a real model."""

import pytest

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.free_rows import ROWS, free_rows, measure_rows, row_price


def step_s(rows: int, fixed: float, price: float) -> float:
    """Waits for the weights, or for arithmetic."""
    return max(fixed, price * rows)


@pytest.mark.parametrize(("price", "expected"), [(0.0, 0), (0.5, 32), (1.0, 24), (1.5, 16), (2.5, 8), (20.0, 0)])
def test_rows_up_to_where_arithmetic_takes_over(price: float, expected: int) -> None:
    assert free_rows({rows: step_s(rows, 20.0, price) for rows in ROWS}) == expected


def test_rows_that_cost_what_they_cost_in_a_prefill_are_none() -> None:
    assert free_rows({rows: 100 + rows for rows in ROWS}) == 0, "little in a step, and nothing saved"


def test_a_machine_whose_times_are_noise() -> None:
    assert free_rows(dict.fromkeys(ROWS, 1.0)) == 0
    assert free_rows({rows: 1.0 / rows for rows in ROWS}) == 0
    assert free_rows({1: 1.0}) == row_price({1: 1.0}) == 0


def test_an_engine_measures_unless_it_is_told() -> None:
    seen: list[str] = []
    core = EngineCore(EngineConfig(dtype="float32", max_model_len=64), seen.append)
    assert "measuring what rows beside a decode cost" in seen
    assert core._scheduler.config.ahead_rows in (0, 8, 16, 24, 32)
    assert core._scheduler.config.ridge == core.ridge > 0
    times = measure_rows(core._runner, core.info)
    assert list(times) == [1, 8, 16, 24, 32], "128 rows are more than a sequence may have"
    assert min(times.values()) > 0

    seen.clear()
    core = EngineCore(EngineConfig(dtype="float32", max_model_len=64, ahead_rows=5), seen.append)
    assert "measuring what rows beside a decode cost" not in seen
    assert core._scheduler.config.ahead_rows == 5
