"""Runs `test_triton.py` on CPU: Triton decides at its import whether it interprets, hence another process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="no Triton here" if importlib.util.find_spec("triton") is None else "a GPU runs test_triton.py itself",
)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["head_shapes or any_forest or error", "not (head_shapes or any_forest or error)"])
def test_kernels_in_the_interpreter(part: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", part]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("test_triton.py"))],
        cwd=Path(__file__).parents[2],
        env={**env, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
