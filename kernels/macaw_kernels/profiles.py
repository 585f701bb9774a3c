"""Built-in device profiles, measured with ``tests/bench/attention.py``."""

from __future__ import annotations

from math import inf

from macaw_kernels.types import DeviceProfile

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
    state_element_ns=1.0,
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
