"""`tests/bench/toggled.py`, which reaches into a server: that it still can, and what it says of what it measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.toggled import ratio

SCRIPT = Path(__file__).parents[1] / "bench" / "toggled.py"


@pytest.mark.slow
def test_each_switch_has_a_ratio() -> None:
    command = [sys.executable, str(SCRIPT), "multi-agent", "--programs", "1", "--scale", "0.01", "--rounds", "2"]
    table = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    ratios = re.findall(r"\| `multi-agent` \| multi-agent \| (\S+) \| ([\d.]+) ", table)
    assert [name for name, _ in ratios][:3] == ["nothing", "prefix-caching", "two-phase"]
    assert len(ratios) == 9
    assert all(0.2 < float(value) < 5 for _, value in ratios), table


def test_a_ratio_is_of_medians_and_knows_how_sure_it_is() -> None:
    on = [[1.0, 1.1], [0.9, 1.0], [1.0, 50.0]]
    assert ratio([[2.0], [2.0], [2.0]], on)[0] == pytest.approx(2.0)
    same, low, high = ratio([[1.0]] * 9, [[1.0]] * 9)
    assert same == low == high == 1
    _, low, high = ratio([[0.5], [1.0], [1.5]] * 3, [[1.0]] * 9)
    assert low < 1 < high
