"""Pictures of a graph: layers from left to right, as SVG; and mermaid's language. No graphviz needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from xml.sax.saxutils import escape

CHARACTER, PADDING, HEIGHT = 7.2, 14.0, 44.0
COLUMN_GAP, ROW_GAP, MARGIN = 56.0, 16.0, 16.0
SWEEPS = 8

STYLE = """
.page{fill:#ffffff;stroke:#d0d7de}.edge{fill:none;stroke:#8c959f;stroke-width:1.5}.head{fill:#8c959f}
text{font-size:13px;font-family:Menlo,Consolas,monospace;fill:#1f2328}.note{font-size:11px;fill:#59636e}
.call{fill:#ddf4ff;stroke:#0969da}.step{fill:#fff8c5;stroke:#9a6700}.variable{fill:#f6f8fa;stroke:#8c959f}
.box{stroke-width:1.5}.waiting{stroke-dasharray:5 3}.failed{fill:#ffebe9;stroke:#cf222e}.asked{stroke-width:3}
@media (prefers-color-scheme:dark){
.page{fill:#0d1117;stroke:#3d444d}.edge{stroke:#9198a1}.head{fill:#9198a1}text{fill:#f0f6fc}.note{fill:#b1bac4}
.call{fill:#0c2d6b;stroke:#4493f8}.step{fill:#3b2300;stroke:#d29922}.variable{fill:#212830;stroke:#9198a1}
.failed{fill:#490202;stroke:#f85149}}
"""

_MERMAID = str.maketrans({'"': "#quot;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "#": "#35;"})


@dataclass(slots=True)
class Box:
    """A node of the picture.

    Attributes:
        title: First line.
        note: Second line.
        kind: `call`, `step` or `variable`.
        state: `waiting`, `done` or `failed`.
        sources: Indices of the boxes that it reads from, which come before it.
        objective: Where the application asked for it.
    """

    title: str
    note: str
    kind: str
    state: str
    sources: list[int] = field(default_factory=list)
    objective: str = ""

    @property
    def lines(self) -> tuple[str, str]:
        """What stands in the box."""
        arrow = "→ " if self.kind != "variable" else ""
        return self.title, f"{arrow}{self.note}" + (f" ({self.objective})" if self.objective else "")


class Pictured(ABC):
    """What has a graph to look at. In a notebook it shows itself as a picture."""

    def to_mermaid(self) -> str:
        """The graph in mermaid's language."""
        return mermaid(self._boxes())

    def to_svg(self) -> str:
        """The graph as a picture, on light and on dark pages."""
        return svg(self._boxes())

    def _repr_svg_(self) -> str:
        return self.to_svg()

    @abstractmethod
    def _boxes(self) -> list[Box]:
        """The nodes; producers first."""


@dataclass(slots=True)
class _Place:
    """A box in its layer, or the place where an edge passes through one."""

    layer: int
    width: float = 0.0
    height: float = 2.0
    y: float = 0.0  # of its centre
    near: list[int] = field(default_factory=list)  # places in the layers beside it


def mermaid(boxes: Sequence[Box]) -> str:
    """The graph in mermaid's language."""
    lines = ["graph LR"]
    for i, box in enumerate(boxes):
        left, right = {"call": ("[", "]"), "step": ("[[", "]]"), "variable": ("([", "])")}[box.kind]
        text = "<br/>".join(map(_mermaid_text, box.lines))
        lines.append(f'  n{i}{left}"{text}"{right}')
        lines += [f"  n{source} --> n{i}" for source in box.sources]
    return "\n".join(lines)


def svg(boxes: Sequence[Box]) -> str:
    """The graph as SVG; it brings its own background, and follows the reader's preference for light or dark."""
    places, routes = _layout(boxes)
    columns = _columns(places)
    right = max((columns[p.layer] + p.width for p in places), default=0.0)
    bottom = max((p.y + p.height / 2 for p in places), default=0.0)
    width, height = right + MARGIN, bottom + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" style="max-width:100%" role="img">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="8"/>',
        *(_edge([places[i] for i in route], columns) for route in routes),
        *(_drawn(box, places[i], columns[places[i].layer]) for i, box in enumerate(boxes)),
        "</svg>",
    ]
    return "\n".join(parts)


def _layout(boxes: Sequence[Box]) -> tuple[list[_Place], list[list[int]]]:
    """Places, those of the boxes first; and for every edge the places that it runs through."""
    places = [_Place(layer, _width(box), HEIGHT) for box, layer in zip(boxes, _layers(boxes), strict=True)]
    routes = []
    for i, box in enumerate(boxes):
        for source in box.sources:
            route = [source]
            for layer in range(places[source].layer + 1, places[i].layer):
                route.append(len(places))
                places.append(_Place(layer))
            route.append(i)
            for a, b in pairwise(route):
                places[a].near.append(b)
                places[b].near.append(a)
            routes.append(route)
    rows: dict[int, list[_Place]] = {}
    for place in places:
        rows.setdefault(place.layer, []).append(place)
    for row in rows.values():
        _spread(row)
    for sweep in range(SWEEPS):
        for layer in sorted(rows, reverse=sweep % 2 == 1):
            for place in rows[layer]:
                if place.near:
                    place.y = sum(places[j].y for j in place.near) / len(place.near)
            rows[layer].sort(key=lambda place: place.y)
            _spread(rows[layer])
    top = min((p.y - p.height / 2 for p in places), default=0.0)
    for place in places:
        place.y += MARGIN - top
    return places, routes


def _layers(boxes: Sequence[Box]) -> list[int]:
    """One more than the last of the sources; what the client brings stands right before its first reader."""
    layers: list[int] = []
    first_reader: dict[int, int] = {}
    for i, box in enumerate(boxes):
        layers.append(1 + max((layers[source] for source in box.sources), default=0 if box.kind != "variable" else -1))
        for source in box.sources:
            first_reader[source] = min(first_reader.get(source, layers[i]), layers[i])
    for i, box in enumerate(boxes):
        if box.kind == "variable" and i in first_reader:
            layers[i] = first_reader[i] - 1
    lowest = min(layers, default=0)
    return [layer - lowest for layer in layers]


def _spread(row: list[_Place]) -> None:
    """Move what overlaps apart, in the row's order, about where its middle was."""
    wished = sum(place.y for place in row) / len(row)
    for above, place in pairwise(row):
        place.y = max(place.y, above.y + (above.height + place.height) / 2 + ROW_GAP)
    shift = wished - sum(place.y for place in row) / len(row)
    for place in row:
        place.y += shift


def _columns(places: Sequence[_Place]) -> list[float]:
    """The left end of every layer."""
    widths = [0.0] * (1 + max((place.layer for place in places), default=0))
    for place in places:
        widths[place.layer] = max(widths[place.layer], place.width)
    lefts = [MARGIN]
    for width in widths:
        lefts.append(lefts[-1] + width + COLUMN_GAP)
    return lefts


def _edge(route: Sequence[_Place], columns: Sequence[float]) -> str:
    points = []
    for place in route[:-1]:  # straight out of its layer, between the boxes there
        points += [(columns[place.layer] + place.width, place.y), (columns[place.layer + 1] - COLUMN_GAP, place.y)]
    x, y = columns[route[-1].layer], route[-1].y
    points.append((x - 7, y))
    path = [f"M{points[0][0]:.1f},{points[0][1]:.1f}"]
    for (x0, y0), (x1, y1) in pairwise(points):
        bend = min((x1 - x0) / 2, COLUMN_GAP)
        path.append(f"C{x0 + bend:.1f},{y0:.1f} {x1 - bend:.1f},{y1:.1f} {x1:.1f},{y1:.1f}")
    head = f'<path class="head" d="M{x:.1f},{y:.1f}l-8,-4v8z"/>'
    return f'<path class="edge" d="{" ".join(path)}"/>{head}'


def _drawn(box: Box, place: _Place, left: float) -> str:
    title, note = map(escape, box.lines)
    middle, top = left + place.width / 2, place.y - HEIGHT / 2
    classes = f"box {box.kind} {box.state}" + (" asked" if box.objective else "")
    radius = HEIGHT / 2 if box.kind == "variable" else 6
    return (
        f'<rect class="{classes}" x="{left:.1f}" y="{top:.1f}" width="{place.width:.1f}" height="{HEIGHT:.0f}" '
        f'rx="{radius:.0f}"/>'
        f'<text x="{middle:.1f}" y="{place.y - 3:.1f}" text-anchor="middle">{title}</text>'
        f'<text class="note" x="{middle:.1f}" y="{place.y + 14:.1f}" text-anchor="middle">{note}</text>'
    )


def _width(box: Box) -> float:
    title, note = box.lines
    return max(len(title) * 1.1, len(note) * 0.95) * CHARACTER + 2 * PADDING


def _mermaid_text(text: str) -> str:
    return text.translate(_MERMAID)
