"""Where and of what a number was measured: machine, commit, command."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch


def machine() -> str:
    """Processor, its instruction set as torch sees it, cores, memory, GPU where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    parts = [
        f"{name} ({torch.backends.cpu.get_cpu_capability()})",
        f"{psutil.cpu_count()} cores",
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__}"])


def load() -> str:
    """What the machine did in the last minute, before it was measured: an idle one says about 0."""
    return f"{psutil.getloadavg()[0]:.1f} of {psutil.cpu_count()} cores were busy before the start"


def commit() -> str:
    """Of the checkout that this code runs from, marked where files differ; else the installed version."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        try:
            return f"macaw {version('macaw')}"
        except PackageNotFoundError:
            return "unknown"


def command(secrets: Sequence[str | None]) -> str:
    """The command line, without keys."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join("***" if word in secrets else word for word in words)
