"""Rows that a step takes along at little cost, measured: the room for work ahead of time beside a decode.

A step of few rows waits for the weights, and further rows hide behind that until arithmetic takes longer. How many
these are depends on the machine, the model and the kernels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from macaw_server.engine.runner import Chunk, ModelRunner
from macaw_server.engine.types import EngineInfo

ROWS = (1, 8, 16, 24, 32, 128)
"""Of the steps that are measured: the first is a decode alone, the last a prefill."""
SLOWDOWN = 1.25
"""Who decodes pays no more than this for what may never be needed."""
_ROUNDS = 3


def measure_rows(runner: ModelRunner, info: EngineInfo) -> dict[int, float]:
    """Seconds of a step by its rows; the least of some, for what else the machine does only adds.

    Takes steps which write to the first pages of the pool: call it before anything is cached.
    """
    capacity = min(info.num_pages * info.page_size, info.max_model_len)
    lengths = [rows for rows in ROWS if rows <= capacity]
    times: dict[int, float] = {}
    for i in range(1 + _ROUNDS):  # the first round compiles and lays out
        for rows in lengths:
            pages = list(range(-(-rows // info.page_size)))
            begin = time.perf_counter()
            runner.run([Chunk([0] * rows, 0, pages, 1)]).max().item()  # waits for the device
            seconds = time.perf_counter() - begin
            if i:
                times[rows] = min(seconds, times.get(rows, seconds))
    return times


def row_price(times: Mapping[int, float]) -> float:
    """Seconds that a row costs in a prefill; 0 where that could not be measured."""
    first, last = min(times), max(times)
    return max(0.0, (times[last] - times[first]) / (last - first)) if last > first else 0.0


def free_rows(times: Mapping[int, float]) -> int:
    """Rows, the decode's own included, up to which a step takes work ahead along; 0 if that does not pay.

    They have to cost less than half of what they cost in a prefill later; of those numbers the one that saves most.
    """
    first, price, best = min(times), row_price(times), (0.0, 0)
    for rows, seconds in times.items():
        later = (rows - first) * price
        saved = later - (seconds - times[first])
        if price and seconds <= SLOWDOWN * times[first] and saved > later / 2:
            best = max(best, (saved, rows))
    return best[1]
