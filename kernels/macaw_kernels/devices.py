"""Names of devices, for files and tables."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import torch


@cache
def device_name(device: torch.device) -> str:
    """Return the model of a device in lower case and dashes, for a CPU with its number of cores."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{_processor()}-x{os.cpu_count()}"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
