"""Tile shapes by architecture, head dim and dtype: built-in values, or those of a file that somebody has measured.

Nothing is tuned while serving: a table is read once, a missing entry is the built-in value.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from macaw_kernels.cpu.build import cache_dir
from macaw_kernels.devices import device_name
from macaw_kernels.profiles import write_json
from macaw_kernels.types import HeadConfig

log = logging.getLogger(__name__)

MAX_HEAD_DIM = 256
MAX_GROUP_SIZE = 64
SPLIT_STEP = 64
"""Keys of a unit are a multiple of this many."""
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""With built-in values of their own; others take those of the nearest older one."""


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How one phase runs.

    Attributes:
        block_m: Rows of a tile: query tokens times query heads of a KV head.
        block_n: Keys of a step.
        num_warps: Warps of a program.
        num_stages: Depth of the load pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Everything about a launch that measurement may change.

    Attributes:
        narrow: For items of few rows: decodes. `block_m` is at least 16, what tensor cores take.
        wide: For all others: shared prefixes, chunks of prefills.
        programs_per_sm: Long key ranges are split until so many programs per multiprocessor run.
        min_split: Keys below which a range is not split.
    """

    narrow: TileConfig
    wide: TileConfig
    programs_per_sm: int = 4
    min_split: int = 256

    def for_group(self, group_size: int) -> KernelConfig:
        """Tiles that hold at least one token of `group_size` query heads."""
        least = 1 << (group_size - 1).bit_length()
        narrow, wide = (
            TileConfig(max(tile.block_m, least), tile.block_n, tile.num_warps, tile.num_stages)
            for tile in (self.narrow, self.wide)
        )
        return KernelConfig(narrow, wide, self.programs_per_sm, self.min_split)


def supports(heads: HeadConfig) -> bool:
    """Whether the kernels take these heads."""
    return max(heads.head_dim, heads.v_head_dim) <= MAX_HEAD_DIM and heads.group_size <= MAX_GROUP_SIZE


def block_dim(head_dim: int) -> int:
    """The width that a head is padded to: a power of two that a matrix product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def built_in(arch: str, head_dim: int, dtype: torch.dtype) -> KernelConfig:
    """The values that this package comes with: estimates that compile without spills, until measured.

    Args:
        arch: One of `ARCHITECTURES`.
        head_dim: The larger of the two head dims.
        dtype: Of queries, keys and values.
    """
    width = block_dim(head_dim)
    if dtype == torch.float32:  # no tensor cores, twice the shared memory
        keys = 16 if width > 64 or arch == "gfx942" else 32
        tile = TileConfig(16, keys, 8 if width > 128 and arch != "gfx942" else 4, 2)
        return KernelConfig(tile, tile)
    if arch == "gfx942":  # 64 KiB of shared memory
        return KernelConfig(TileConfig(16, 32, 4, 1), TileConfig(64, 32, 8 if width > 128 else 4, 1))
    keys = 32 if width > 128 else 64
    stages = 2 if width > 128 else 3
    return KernelConfig(
        TileConfig(16, keys, 4, stages), TileConfig(64, keys, 8 if width > 64 or arch == "sm_100" else 4, stages)
    )


def config_file(device: str) -> Path:
    """Where the measured values of a device lie."""
    return cache_dir() / "kernels" / f"tiles-{device}.json"


def config_key(head_dim: int, dtype: torch.dtype) -> str:
    """The name of an entry in the file."""
    return f"{str(dtype).removeprefix('torch.')}-d{block_dim(head_dim)}"


@cache
def kernel_config(device: torch.device, heads: HeadConfig, dtype: torch.dtype) -> KernelConfig:
    """The launch parameters on this device: measured ones where a file has them, else built-in ones."""
    head_dim = max(heads.head_dim, heads.v_head_dim)
    if device.type == "cpu":  # the interpreter: split what is long for a test
        return replace(built_in("sm_80", head_dim, dtype), min_split=SPLIT_STEP).for_group(heads.group_size)
    measured = _measured(device_name(device)).get(config_key(head_dim, dtype))
    return (measured or built_in(architecture(device), head_dim, dtype)).for_group(heads.group_size)


def architecture(device: torch.device) -> str:
    """The nearest entry of `ARCHITECTURES` that is not newer than the device."""
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def save_config(device: str, head_dim: int, dtype: torch.dtype, config: KernelConfig) -> Path:
    """Write measured values to where `kernel_config` finds them, beside those of other head dims and dtypes."""
    _measured.cache_clear()
    kernel_config.cache_clear()
    table = {**_measured(device), config_key(head_dim, dtype): config}
    path = write_json(config_file(device), {key: asdict(entry) for key, entry in table.items()})
    _measured.cache_clear()
    return path


@cache
def _measured(device: str) -> dict[str, KernelConfig]:
    path = config_file(device)
    try:
        table = json.loads(path.read_text())
        return {
            key: KernelConfig(
                TileConfig(**entry["narrow"]),
                TileConfig(**entry["wide"]),
                int(entry["programs_per_sm"]),
                int(entry["min_split"]),
            )
            for key, entry in table.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as e:
        log.warning("built-in kernel configurations are used: %s cannot be read (%s)", path, e)
        return {}
