"""Device profiles: built-in ones, and those that ``macaw kernels fit`` has measured and keeps in files. No torch."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, fields
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from macaw_kernels.cpu.build import cache_dir
from macaw_kernels.types import DeviceProfile, HeadConfig

log = logging.getLogger(__name__)

CPU_TORCH = DeviceProfile(
    "cpu-torch",
    share_us=200.0,
    kv_element_ns=0.4,
    state_element_ns=4.0,
    launch_us=40.0,
    tile_bytes=2 << 20,
)
"""The portable torch path in float32 on two Zen 3 cores."""

CPU_NATIVE = DeviceProfile(
    "cpu-native",
    share_us=10.0,
    kv_element_ns=0.1,
    state_element_ns=2.0,
    launch_us=0.0,
    tile_bytes=2 << 20,
)
"""The native kernels on two Zen 3 cores."""

ALWAYS_SHARE = DeviceProfile(
    "always-share",
    share_us=0.0,
    kv_element_ns=1.0,
    state_element_ns=0.0,
    launch_us=40.0,
    tile_bytes=2 << 20,
)
"""Shares every common page whatever it costs: for tests and ablations."""

NEVER_SHARE = DeviceProfile(
    "never-share",
    share_us=inf,
    kv_element_ns=1.0,
    state_element_ns=0.0,
    launch_us=40.0,
    tile_bytes=2 << 20,
)
"""Plain paged attention: the control of tests and ablations."""

_BANDWIDTHS = {"b200": 8.0, "h200": 4.8, "h100": 3.35, "a100": 2.0, "mi300": 5.3, "l40": 0.86, "l20": 0.86, "a10": 0.6}
"""Memory bandwidth by part of the device's name, in TB/s, from data sheets."""
_GPU_EFFICIENCY = 0.8
_GPU_LAUNCH_US = 5.0


def gpu_profile(device: str) -> DeviceProfile:
    """Return an **estimate** for a GPU and 16-bit keys and values, from its bandwidth and the cost of a launch.

    Args:
        device: Its name; one that is not known is taken for a GPU of 1 TB/s.
    """
    bandwidth = next((value for part, value in _BANDWIDTHS.items() if part in device), 1.0)
    byte_ns = 1e-3 / (bandwidth * _GPU_EFFICIENCY)
    return DeviceProfile(
        f"{device}-estimate",
        share_us=_GPU_LAUNCH_US,
        kv_element_ns=2 * byte_ns,
        state_element_ns=8 * byte_ns,  # float32, written and read
        launch_us=_GPU_LAUNCH_US,
        tile_bytes=64 << 20,
    )


def profile_file(device: str, backend: str, dtype: object) -> Path:
    """Where the measured profile of a device lies."""
    return cache_dir() / "kernels" / f"profile-{device}-{backend}-{str(dtype).removeprefix('torch.')}.json"


class Fit(NamedTuple):
    """What ``macaw kernels fit`` has found out about some heads.

    Attributes:
        profile: Of these heads.
        points: The measurements: what the four coefficients multiply, and nanoseconds.
    """

    profile: DeviceProfile
    points: list[list[float]]


class Fits(NamedTuple):
    """What a file holds.

    Attributes:
        by_heads: By the name of the heads.
        common: Fitted to the points of all of them: for heads that were not measured.
    """

    by_heads: dict[str, Fit]
    common: DeviceProfile


def load_profile(device: str, backend: str, dtype: object, heads: HeadConfig | None = None) -> DeviceProfile | None:
    """Return what ``macaw kernels fit`` has measured for this device, backend and dtype; None if it has not.

    Args:
        device: As from `devices.device_name`.
        backend: A name of `BACKENDS`.
        dtype: Of keys and values.
        heads: For which the profile is wanted; those that were not measured, and None, get the common one.
    """
    fits = load_fits(device, backend, dtype)
    if fits is None:
        return None
    own = None if heads is None else fits.by_heads.get(heads.name)
    return fits.common if own is None else own.profile


def load_fits(device: str, backend: str, dtype: object) -> Fits | None:
    """Return all that was measured for this device, backend and dtype; None if there is nothing, or it is damaged."""
    path = profile_file(device, backend, dtype)
    try:
        values = json.loads(path.read_text())
        by_heads = {
            name: Fit(_profile(fit["profile"]), [[float(x) for x in point] for point in fit["points"]])
            for name, fit in values["by_heads"].items()
        }
        return Fits(by_heads, _profile(values["common"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        log.warning("the built-in device profile is used: %s cannot be read (%s); run `macaw kernels fit`", path, e)
        return None


def save_fits(fits: Fits, device: str, backend: str, dtype: object) -> Path:
    """Write measured profiles to where `load_profile` finds them."""
    content = {
        "by_heads": {
            name: {"profile": asdict(fit.profile), "points": fit.points} for name, fit in fits.by_heads.items()
        },
        "common": asdict(fits.common),
    }
    return write_json(profile_file(device, backend, dtype), content)


def write_json(path: Path, content: object) -> Path:
    """Write a file as a whole or not at all, for others read it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)
    return path


def _profile(values: dict[str, Any]) -> DeviceProfile:
    return DeviceProfile(**{each.name: _number(values, each.name) for each in fields(DeviceProfile)})


def _number(values: dict[str, Any], name: str) -> Any:
    value = values[name]
    if name != "name" and not (isinstance(value, int | float) and value >= 0):
        raise ValueError(f"{name} is {value!r}; a number of at least 0")
    return value
