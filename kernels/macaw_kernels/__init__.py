"""Attention over paged KV caches, with shared prefixes read once.

`plan` turns a step's block tables into work items (no torch), `attend` runs them for each layer.
"""

from macaw_kernels.attention import attend
from macaw_kernels.backends import BACKENDS, best_backend, default_profile, native_available
from macaw_kernels.merge import AttentionState, merge_states
from macaw_kernels.planner import Planner, plan
from macaw_kernels.profiles import ALWAYS_SHARE, CPU_NATIVE, CPU_TORCH, NEVER_SHARE
from macaw_kernels.reference import reference_attend
from macaw_kernels.store import store_kv
from macaw_kernels.types import AttentionPlan, DeviceProfile, HeadConfig, WorkItem

__all__ = [
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
