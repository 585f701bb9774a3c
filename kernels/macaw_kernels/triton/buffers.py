"""A plan's arrays on the device.

Eagerly, each plan gets buffers of just its size. A CUDA graph needs the same tensors in each replay: make `PlanBuffers`
with a `Capacity` once, `load` a plan, capture `attend` with that plan, and from then on `load` the next step's plan and
replay. What changes is copied in (one packed array, and the few pages that the sequences have got), the number of units
is read on the device, and programs beyond it end at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from macaw_kernels.transfers import upload
from macaw_kernels.triton.configs import KernelConfig, kernel_config
from macaw_kernels.triton.layout import UNIT_FIELDS, Capacity, Layout, build_layout, check_capacity, decode_capacity
from macaw_kernels.types import AttentionPlan, HeadConfig, IntArray

INTERPRETER_SMS = 4
"""What the interpreter is taken for, so that it sees split ranges at the sizes of tests."""


class _Sections(NamedTuple):
    """Ends of the parts of the packed array, each a multiple of 16 bytes."""

    counts: slice
    narrow: slice
    wide: slice
    rows: slice
    positions: slice
    merge_starts: slice
    merge_states: slice


class PlanBuffers:
    """The device's side of a plan, of fixed size.

    Args:
        heads: Heads of the layers.
        capacity: What the buffers hold.
        window: Of the layers; layers with another one need buffers of their own.
        device: Where the pages are.
        dtype: Of queries, keys and values.
        config: How to launch; None is the device's `kernel_config`.
    """

    def __init__(
        self,
        heads: HeadConfig,
        capacity: Capacity,
        window: int | None,
        device: torch.device,
        dtype: torch.dtype,
        config: KernelConfig | None = None,
    ) -> None:
        self.config: KernelConfig = config or kernel_config(device, heads, dtype)
        self.capacity = capacity
        self._window, self._device, self._dtype = window, device, dtype
        sizes = (
            4,
            capacity.num_narrow * UNIT_FIELDS,
            capacity.num_wide * UNIT_FIELDS,
            capacity.num_rows,
            capacity.num_tokens,
            capacity.num_tokens + 1,
            capacity.num_states,
        )
        ends = np.cumsum([-(-size // 4) * 4 for size in sizes]).tolist()
        starts = [0, *ends[:-1]]
        self._sections = _Sections(*(slice(a, a + size) for a, size in zip(starts, sizes, strict=True)))
        pinned = device.type == "cuda"
        self._host = torch.zeros(ends[-1], dtype=torch.int32, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        packed = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        self._packed = packed
        self.counts, narrow, wide, self.rows, self.positions, self.merge_starts, self.merge_states = (
            packed[section] for section in self._sections
        )
        self.narrow, self.wide = narrow.view(-1, UNIT_FIELDS), wide.view(-1, UNIT_FIELDS)
        self.tables = torch.zeros(capacity.batch, capacity.num_pages, dtype=torch.int32, device=device)
        self._last_tables: IntArray | None = None
        self._last_num_pages = np.zeros(0, dtype=np.int64)
        self.num_states = capacity.num_states
        self.o = torch.empty(
            max(1, capacity.num_states), heads.num_q_heads, heads.v_head_dim, dtype=torch.float32, device=device
        )
        self.lse = torch.empty(max(1, capacity.num_states), heads.num_q_heads, dtype=torch.float32, device=device)

    def load(self, plan: AttentionPlan) -> None:
        """Make `plan` the one that `attend` runs with these buffers; copies are ordered in the current stream.

        Raises:
            ValueError: The plan is larger than the capacity, or not of exactly its number of tokens.
        """
        layout = build_layout(plan, self.config, self._window, num_sms(self._device), self.capacity)
        check_capacity(plan, layout, self.capacity)
        self._copy(plan, layout)
        plan.cache[_key(self._window, self._device, self._dtype)] = self

    def _copy(self, plan: AttentionPlan, layout: Layout) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copy may still read what is written now
        host, sections = self._host.numpy(), self._sections
        parts = (
            (sections.counts, np.array([len(layout.narrow), len(layout.wide)])),
            (sections.narrow, layout.narrow.ravel()),
            (sections.wide, layout.wide.ravel()),
            (sections.rows, layout.rows),
            (sections.positions, plan.positions),
            (sections.merge_starts, layout.merge_starts),
            (sections.merge_states, layout.merge_states),
        )
        for section, values in parts:
            host[section.start : section.start + len(values)] = values
        self._packed.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._copy_tables(plan)

    def _copy_tables(self, plan: AttentionPlan) -> None:
        """Copy the pages that are new; a planner that takes its decisions over keeps the same table."""
        num_pages = -(-plan.context_lens // plan.page_size)
        if plan.block_tables is self._last_tables:
            grown = np.flatnonzero(num_pages > self._last_num_pages)
            if len(grown):
                counts = (num_pages - self._last_num_pages)[grown]
                sequence = np.repeat(grown, counts)
                nth = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
                column = self._last_num_pages[sequence] + nth
                pages = upload(plan.block_tables[sequence, column].astype(np.int32), self._device)
                where = upload(sequence * self.tables.shape[1] + column, self._device)
                self.tables.view(-1).index_copy_(0, where, pages)
        else:
            batch, width = len(num_pages), int(num_pages.max())
            tables = plan.block_tables[:, :width].astype(np.int32)
            self.tables[:batch, :width].copy_(upload(tables, self._device))
        self._last_tables, self._last_num_pages = plan.block_tables, num_pages


def decode_buffers(
    heads: HeadConfig, window: int | None, batch: int, num_pages: int, device: torch.device, dtype: torch.dtype
) -> PlanBuffers:
    """Buffers for the decode steps of a graph.

    Args:
        heads: Heads of the layers.
        window: Of the layers.
        batch: Sequences, with one query token each.
        num_pages: Pages of the longest sequence.
        device: Where the pages are.
        dtype: Of queries, keys and values.
    """
    config = kernel_config(device, heads, dtype)
    capacity = decode_capacity(batch, num_pages, heads.group_size, heads.num_kv_heads, config, num_sms(device))
    return PlanBuffers(heads, capacity, window, device, dtype)


def plan_buffers(
    plan: AttentionPlan,
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
    config: KernelConfig | None = None,
) -> PlanBuffers:
    """Return the buffers that hold the plan; made at its first layer, with this `config`, unless they were loaded."""
    if window is not None and window > plan.positions.max() and _key(window, device, dtype) not in plan.cache:
        window = None  # hides nothing
    buffers: PlanBuffers | None = plan.cache.get(_key(window, device, dtype))
    if buffers is None:
        config = config or kernel_config(device, plan.head_config, dtype)
        layout = build_layout(plan, config, window, num_sms(device))
        capacity = Capacity(
            num_tokens=plan.num_tokens,
            num_rows=len(layout.rows),
            num_narrow=len(layout.narrow),
            num_wide=len(layout.wide),
            num_states=layout.num_states,
            batch=len(plan.context_lens),
            num_pages=int(-(-plan.context_lens.max() // plan.page_size)),
        )
        buffers = PlanBuffers(plan.head_config, capacity, window, device, dtype, config)
        buffers._copy(plan, layout)
        plan.cache[_key(window, device, dtype)] = buffers
    return buffers


def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type != "cuda":
        return INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _key(window: int | None, device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
    return "triton", window, device, dtype
