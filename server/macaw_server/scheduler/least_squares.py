"""Small weighted least squares with non-negative coefficients. Pure Python: five unknowns need no array library."""

from __future__ import annotations

from collections.abc import Sequence


class NormalEquations:
    """Sums over observations ``(x, y, weight)``: all that least squares needs of them.

    Args:
        size: Number of unknowns.

    Attributes:
        xx: Sum of ``weight * x x^T``, rows.
        xy: Sum of ``weight * x y``.
        yy: Sum of ``weight * y y``.
        weight: Sum of weights.
    """

    __slots__ = ("weight", "xx", "xy", "yy")

    def __init__(self, size: int) -> None:
        self.xx = [[0.0] * size for _ in range(size)]
        self.xy = [0.0] * size
        self.yy = 0.0
        self.weight = 0.0

    def add(self, x: Sequence[float], y: float, weight: float) -> None:
        """Take in one observation."""
        for i, xi in enumerate(x):
            row, wx = self.xx[i], weight * xi
            for j, xj in enumerate(x):
                row[j] += wx * xj
            self.xy[i] += wx * y
        self.yy += weight * y * y
        self.weight += weight

    def merge(self, other: NormalEquations) -> None:
        """Take in all that `other` has."""
        for row, theirs in zip(self.xx, other.xx, strict=True):
            for j, value in enumerate(theirs):
                row[j] += value
        for i, value in enumerate(other.xy):
            self.xy[i] += value
        self.yy += other.yy
        self.weight += other.weight

    def scale(self, factor: float) -> None:
        """Let everything so far count `factor` as much."""
        for row in self.xx:
            for j in range(len(row)):
                row[j] *= factor
        for i in range(len(self.xy)):
            self.xy[i] *= factor
        self.yy *= factor
        self.weight *= factor

    def rescale(self, factor: float) -> None:
        """As if every `y` so far had been `factor` times what it was."""
        for i in range(len(self.xy)):
            self.xy[i] *= factor
        self.yy *= factor * factor

    def scalar_fit(self, direction: Sequence[float]) -> float:
        """The factor of `direction` that fits best; 0 if there is nothing to fit."""
        size = range(len(direction))
        along = sum(direction[i] * self.xx[i][j] * direction[j] for i in size for j in size)
        return sum(d * b for d, b in zip(direction, self.xy, strict=True)) / along if along > 0 else 0.0


def solve_nonnegative(sums: NormalEquations, target: Sequence[float], ridge: float) -> list[float]:
    """Minimise the squared error under ``coefficients >= 0``, drawn towards `target` where data says little.

    An active-set method (Lawson & Hanson, "Solving Least Squares Problems", 1974, chapter 23).

    Args:
        sums: The data.
        target: Non-negative coefficients to keep to.
        ridge: Weight of one coefficient's relative distance from its target, in observations.
    """
    size = len(target)
    a = [row[:] for row in sums.xx]
    b = sums.xy[:]
    for i, wanted in enumerate(target):
        # A target of zero is kept to as well, on the scale on which the coefficient would matter a little.
        matters = 0.01 * (sums.weight / a[i][i]) ** 0.5 if a[i][i] > 0 else 0.0
        unit = max(wanted, matters)
        pull = ridge / (unit * unit) if unit > 0 else 1.0
        a[i][i] += pull
        b[i] += pull * wanted
    free: list[int] = []
    x = [0.0] * size
    for _ in range(3 * size):
        slope = [b[i] - sum(a[i][j] * x[j] for j in range(size)) for i in range(size)]
        # In relative terms, since the unknowns are of very different sizes.
        gains = [(slope[i] / a[i][i] ** 0.5, i) for i in range(size) if i not in free]
        if not gains or (best := max(gains))[0] <= 1e-9 * (sums.yy + 1.0) ** 0.5:
            break
        free.append(best[1])
        while free:
            solved = _solve([[a[i][j] for j in free] for i in free], [b[i] for i in free])
            if min(solved) > 0:
                x = [0.0] * size
                for i, value in zip(free, solved, strict=True):
                    x[i] = value
                break
            step = min(x[i] / (x[i] - s) for i, s in zip(free, solved, strict=True) if s <= 0)
            for i, value in zip(free, solved, strict=True):
                x[i] = max(0.0, x[i] + step * (value - x[i]))
            stuck = min(zip(free, solved, strict=True), key=lambda pair: (x[pair[0]] > 0, pair[1]))[0]
            free = [i for i in free if x[i] > 0 and i != stuck]
            x = [value if i in free else 0.0 for i, value in enumerate(x)]
    return x


def _solve(a: list[list[float]], b: list[float]) -> list[float]:
    """Solve a small symmetric positive definite system by elimination, scaled to a unit diagonal."""
    size = len(b)
    scale = [a[i][i] ** -0.5 for i in range(size)]
    rows = [[a[i][j] * scale[i] * scale[j] for j in range(size)] + [b[i] * scale[i]] for i in range(size)]
    for i in range(size):
        pivot = max(rows[i][i], 1e-12)
        for k in range(i + 1, size):
            if factor := rows[k][i] / pivot:
                for j in range(i, size + 1):
                    rows[k][j] -= factor * rows[i][j]
    x = [0.0] * size
    for i in reversed(range(size)):
        x[i] = (rows[i][size] - sum(rows[i][j] * x[j] for j in range(i + 1, size))) / max(rows[i][i], 1e-12)
    return [value * s for value, s in zip(x, scale, strict=True)]
