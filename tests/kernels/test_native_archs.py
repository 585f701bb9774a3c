"""The native kernels as other processors get them: compiled for less than this one has, in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from macaw_kernels.backends import native_available

LEVELS = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512f"}
FLAGS = Path("/proc/cpuinfo")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native_available(), reason="no native kernels on this machine; the log says why"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86-64 processor"),
]


@pytest.mark.parametrize("arch", LEVELS)
def test_kernels_on_a_lesser_processor(arch: str) -> None:
    if LEVELS[arch] not in FLAGS.read_text().split():
        pytest.skip(f"this processor is no {arch}")
    here, server = Path(__file__).parent, Path(__file__).parents[1] / "server" / "engine"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [
            *command,
            here / "test_cpu_linear.py",
            here / "test_native.py",
            server / "test_models.py",
            "-k",
            "not compiler",
        ],
        cwd=Path(__file__).parents[2],
        env={**env, "MACAW_NATIVE_ARCH": arch},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
