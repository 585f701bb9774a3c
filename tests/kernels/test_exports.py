"""The public names."""

from __future__ import annotations

import macaw_kernels


def test_exported_names() -> None:
    assert macaw_kernels.__all__ == [
        "ALWAYS_SHARE",
        "BACKENDS",
        "CPU_NATIVE",
        "CPU_TORCH",
        "NEVER_SHARE",
        "AttentionPlan",
        "AttentionState",
        "DeviceProfile",
        "HeadConfig",
        "Planner",
        "WorkItem",
        "attend",
        "best_backend",
        "default_profile",
        "merge_states",
        "native_available",
        "plan",
        "reference_attend",
        "store_kv",
    ]
    assert all(hasattr(macaw_kernels, name) for name in macaw_kernels.__all__)
