"""The picture of what each switch brings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from macaw_server.bench.workload.gains import switch_gains
from macaw_server.bench.workload.report import CaseResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_gains(figure: Figure, result: CaseResult) -> bool:
    """A bar from 1 to each gain, on a scale on which 2x and 1/2x are as long; False if no switch was measured."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    gains = switch_gains(result.rounds)
    if not gains:
        return False
    apps = list(gains[0].by_app)
    height = 0.8 / len(apps)
    figure.set_size_inches(8, 1.4 + 0.4 * len(gains) * max(1.0, 0.6 * len(apps)))
    axis: Any = figure.subplots()
    ends = [1.0]
    for i, app in enumerate(apps):
        for row, gain in enumerate(gains):
            spread = gain.by_app[app]
            y = row + (i - (len(apps) - 1) / 2) * height
            color = f"C{i}"
            axis.barh(y, spread.median - 1, height, left=1, color=color, label=app if row == 0 else None)
            axis.plot([spread.low, spread.high], [y, y], color="black", linewidth=1)
            axis.annotate(
                f"{spread.median:.2f}x", (max(spread.high, 1.0), y), (4, 0), textcoords="offset points", va="center"
            )
            ends += [spread.low, spread.high]
    axis.set_yticks(range(len(gains)), [gain.name for gain in gains])
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_xscale("log")
    low, high = min(0.9, min(ends)), max(1.2, max(ends))
    room = 1.25 if high < 2 else (high / low) ** 0.15  # for the last number
    axis.set_xlim(low / 1.02, high * room)
    axis.set_xticks(_ticks(low, high * room))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="mean latency without it, over that with everything on", title=f"Gain per switch: {result.name}")
    axis.invert_yaxis()
    if len(apps) > 1:
        axis.legend()
    return True


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within, fewer the further they reach."""
    steps: tuple[float, ...] = (1.0, 1.1, 1.2, 1.3, 1.5, 1.75) if high / low < 2.5 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    if high / low > 12:
        steps = (1.0, 2.0, 5.0)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10**e for e in decades for step in (*steps, 8.0, 9.0) if low <= step * 10**e <= high]
