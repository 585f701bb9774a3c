"""Which GPUs each of several engines gets. No torch: the server decides it before it starts their processes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from macaw_server.config import EngineConfig


class Share(NamedTuple):
    """What one of several engines is started with.

    Attributes:
        config: Its part of what all may use: `engines` are those that share its devices.
        visible_gpus: Value of ``CUDA_VISIBLE_DEVICES`` for its processes; None leaves that as it is.
    """

    config: EngineConfig
    visible_gpus: str | None


def find_gpus(environ: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """The NVIDIA GPUs that processes started from here see, by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    if (chosen := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    num_gpus = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.glob("nvidia*"))
    return [str(i) for i in range(num_gpus)]


def shares(config: EngineConfig, gpus: list[str]) -> list[Share]:
    """What each engine of `--engines` is started with: GPUs in turn, as many as it has ranks.

    Engines share GPUs where there are too few, and all are on one where `--device` names it, or there is just one.

    Args:
        config: As the server got it.
        gpus: See `find_gpus`.
    """
    size = config.tensor_parallel_size
    groups = [gpus[start : start + size] for start in range(0, len(gpus) - size + 1, size)]
    if config.device not in ("auto", "cuda") or len(groups) < 2:
        return [Share(config, None)] * config.engines
    groups = groups[: config.engines]
    kv_memory = None if config.kv_memory is None else config.kv_memory // config.engines
    found = []
    for i in range(config.engines):
        group = i % len(groups)
        num_sharing = len(range(group, config.engines, len(groups)))
        changes = {"engines": num_sharing, "kv_memory": None if kv_memory is None else kv_memory * num_sharing}
        found.append(Share(config.model_copy(update=changes), ",".join(groups[group])))
    return found
