"""Every variant of the kernels, compiled for targets that need not be here, and what resources it takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from macaw_kernels.triton.attend_kernel import attend_kernel
from macaw_kernels.triton.configs import ARCHITECTURES, TileConfig, block_dim, built_in
from macaw_kernels.triton.layout import UNIT_FIELDS
from macaw_kernels.triton.merge_kernel import merge_kernel
from macaw_kernels.triton.store_kernel import store_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""What one program may have."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (64, 80, 96, 128, 256)
FEATURES = ((), ("HAS_WINDOW",), ("HAS_SOFT_CAP",), ("HAS_SINKS",), ("HAS_WINDOW", "HAS_SOFT_CAP", "HAS_SINKS"))
_POINTERS = {"p_count": "i32", "p_units": "i32", "p_rows": "i32", "p_positions": "i32", "p_tables": "i32"}
_POINTERS |= {"p_o": "fp32", "p_lse": "fp32", "p_starts": "i32", "p_states": "i32", "p_slots": "i64"}
_SCALARS = {"scale": "fp32", "soft_cap": "fp32"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel for one target.

    Attributes:
        target: One of `TARGETS`.
        kernel: "narrow" or "wide" (the two phases of attention), "merge" or "store".
        dtype: One of `DTYPES`.
        head_dim: Of keys and values.
        features: Constants of the attention kernel that are on.
    """

    target: str
    kernel: str
    dtype: str
    head_dim: int
    features: tuple[str, ...] = ()


class Resources(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        registers: Per thread.
        spills: Bytes (NVIDIA) or registers (AMD) per thread that did not fit the registers.
        shared_bytes: Per program.
        shared_limit: What the target has.
    """

    registers: int
    spills: int
    shared_bytes: int
    shared_limit: int

    @property
    def sound(self) -> bool:
        """Whether it fits, without spills."""
        return not self.spills and self.shared_bytes <= self.shared_limit


def variants(targets: tuple[str, ...] = ARCHITECTURES, all_features: bool = True) -> Iterator[Variant]:
    """Yield what the backend may launch: all, or those without and those with every feature."""
    features = FEATURES if all_features else (FEATURES[0], FEATURES[-1])
    for target, dtype, head_dim in product(targets, DTYPES, HEAD_DIMS):
        for kernel, chosen in product(("narrow", "wide"), features):
            yield Variant(target, kernel, dtype, head_dim, chosen)
        yield Variant(target, "merge", dtype, head_dim, ("HAS_SINKS",))
        yield Variant(target, "store", dtype, head_dim)


def compile_variant(variant: Variant, tile: TileConfig | None = None) -> Resources:
    """Compile, with the built-in tile of the phase unless another one is given."""
    width, heads = block_dim(variant.head_dim), 8
    dims = {"V_HEAD_DIM": variant.head_dim, "BLOCK_DV": width}
    if variant.kernel == "merge":
        constants = {"NUM_Q_HEADS": 32, "BLOCK_S": 8, "HAS_SINKS": "HAS_SINKS" in variant.features, **dims}
        return _compile(merge_kernel, variant, constants, {"num_warps": 1})
    dims |= {"NUM_KV_HEADS": heads, "HEAD_DIM": variant.head_dim, "BLOCK_D": width}
    if variant.kernel == "store":
        return _compile(store_kernel, variant, {"BLOCK_H": heads, **dims}, {})
    config = built_in(variant.target, variant.head_dim, DTYPES[variant.dtype])
    tile = tile or (config.narrow if variant.kernel == "narrow" else config.wide)
    constants = {
        "GROUP_SIZE": 4,
        "PAGE_SIZE": 16,
        "UNIT_FIELDS": UNIT_FIELDS,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        **{name: name in variant.features for name in FEATURES[-1]},
        **dims,
    }
    return _compile(attend_kernel, variant, constants, {"num_warps": tile.num_warps, "num_stages": tile.num_stages})


def _compile(kernel: Any, variant: Variant, constants: dict[str, Any], options: dict[str, int]) -> Resources:
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        is_pointer = name.startswith("p_")
        signature[name] = f"*{_POINTERS.get(name, variant.dtype)}" if is_pointer else _SCALARS.get(name, "i32")
        if is_pointer or name.startswith("stride_"):  # what the launcher finds at run time
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=TARGETS[variant.target], options=options)
    limit = SHARED_BYTES[variant.target]
    if "cubin" in compiled.asm:
        report = _run_tool("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage")
        registers, spills = _number(r"REG:(\d+)", report), _number(r"STACK:(\d+)", report)
        if spills:  # not all that is on the stack was spilled
            tool = "ptxas-blackwell" if variant.target == "sm_100" else "ptxas"
            arch = _text(r"\.target (\w+)", compiled.asm["ptx"])
            report = _run_tool(tool, compiled.asm["ptx"].encode(), "-v", f"--gpu-name={arch}", "-o", "/dev/null")
            spills = _number(r"(\d+) bytes spill stores", report)
    else:
        report = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", report)
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", report) + _number(r"\.sgpr_spill_count:\s+(\d+)", report)
    return Resources(registers, spills, compiled.metadata.shared, limit)


def _run_tool(name: str, content: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run([str(tool), *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, report: str) -> int:
    return int(_text(pattern, report))


def _text(pattern: str, report: str) -> str:
    found = re.search(pattern, report)
    if found is None:
        raise ValueError(f"no {pattern} in the compiler's report: {report[:500]}")
    return found.group(1)
