"""Runs `test_graphs.py` with Triton's interpreter: Triton decides at its import whether it interprets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_plans_in_fixed_buffers() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", "change_nothing or does_not_fit", str(Path(__file__).with_name("test_graphs.py"))],
        cwd=Path(__file__).parents[3],
        env={**env, "TRITON_INTERPRET": "1", "MACAW_NATIVE": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout
