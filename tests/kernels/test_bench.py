"""The benchmark's own logic: its cases are the trees they say, and wrong answers are not timed."""

from __future__ import annotations

import pytest
import torch

from macaw_kernels import BACKENDS, HeadConfig, bench
from macaw_kernels.bench import Case, WrongAnswerError, copy_gb_s, cpu_cases, gpu_cases, run_case

HEADS = HeadConfig(4, 2, 16, 16)
CPU = torch.device("cpu")


def test_a_case_is_the_tree_it_says() -> None:
    case = Case(HEADS, ((1, 32), (2, 16), (6, 5)))
    tables = case.block_tables()
    assert case.name == "1,2,6_32,16,5"
    assert (case.batch, case.context, case.num_pages) == (6, 53, 2 + 2 + 6)
    assert len({tuple(table[:2]) for table in tables}) == 1
    assert [tables[i][2] == tables[0][2] for i in range(6)] == [True] * 3 + [False] * 3
    assert len({page for table in tables for page in table}) == case.num_pages


def test_all_cases_have_whole_pages_above_the_leaves() -> None:
    for case in [*gpu_cases(), *cpu_cases(HEADS)]:
        assert all(tokens % bench.PAGE_SIZE == 0 for _, tokens in case.levels[:-1]), case.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_case_is_checked_and_timed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "_LAYER_BYTES", 1 << 16)
    case = Case(HEADS, ((1, 64), (3, 9)))
    limit = copy_gb_s(CPU)
    result = run_case(case, CPU, dtype, limit, rounds=3)
    assert result.plain_ms > 0
    least, most = result.gain[1:]
    assert least <= result.gain[0] <= most
    assert result.plain_gb_s > 0 < result.roofline


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = BACKENDS["torch"]._replace(attend=lambda q, k, v, plan, out, **options: out.fill_(9.0))
    monkeypatch.setitem(BACKENDS, "torch", broken)
    with pytest.raises(WrongAnswerError, match="1,3_64,9 on torch: off by"):
        run_case(Case(HEADS, ((1, 64), (3, 9))), CPU, torch.float32, 1.0, rounds=1, backend="torch")
