"""The pictures of a program: what is in them, that nothing lies on anything else, and that they are well-formed."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

import macaw
from macaw.functions.drawing import Box, _columns, _layout, mermaid, svg
from macaw.functions.graph import Ask
from macaw.functions.variable import fail, settle

SVG = "{http://www.w3.org/2000/svg}"


@macaw.function
def draft(task, notes="none"):
    """{{input:task}} {{input:notes}} {{output:text}} Shorter. {{output:short}} Shorter still. {{output:title}}"""


@macaw.native_function
def count(text, other):
    return len(text)


def built():
    with macaw.session("http://127.0.0.1:9") as session:
        task = macaw.variable("task", value='Say "<hello>" & goodbye to everybody')
        text, short, title = draft(task)
        counted = count(short, macaw.variable("later"))
        settle(text, "x")
        fail(counted, macaw.MacawError("boom"))
        session._graph.ask(title, Ask("throughput", None))
        return session.program


def test_picture_has_every_node_and_its_state():
    program = built()
    root = ET.fromstring(program._repr_svg_())
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert texts[:2] == ["task", 'Say "<hello>" & goodbye…']
    assert texts.count("draft") == 3
    assert "→ title (throughput)" in texts
    classes = [element.get("class") for element in root.iter(f"{SVG}rect")][1:]
    assert sorted(classes) == [
        "box call done",
        "box call failed",
        "box call failed asked",
        "box step failed",
        "box variable done",
        "box variable waiting",
    ]
    assert "prefers-color-scheme:dark" in program.to_svg()
    assert repr(program) == "<Program (not sent): 4 calls and steps>"


def test_mermaid_escapes_and_joins():
    program = built()
    lines = program.to_mermaid().splitlines()
    assert lines[0] == "graph LR"
    assert '  n0(["task<br/>Say #quot;#lt;hello#gt;#quot; #amp; goodbye…"])' in lines
    assert '  n1["draft<br/>→ text"]' in lines
    edges = [line.strip() for line in lines if "-->" in line]
    assert edges == ["n0 --> n1", "n1 --> n2", "n2 --> n3", "n2 --> n5", "n4 --> n5"], "a later output hides the task"
    assert '  n5[["count<br/>→ result"]]' in lines


def test_empty_program_is_a_picture_too():
    ET.fromstring(svg([]))
    assert mermaid([]) == "graph LR"


@st.composite
def graphs(draw):
    boxes = []
    for i in range(draw(st.integers(1, 14))):
        sources = draw(st.lists(st.integers(0, i - 1), unique=True, max_size=4)) if i else []
        kind = draw(st.sampled_from(["call", "step"])) if sources else draw(st.sampled_from(["call", "variable"]))
        boxes.append(Box("name" * draw(st.integers(1, 4)), "note", kind, "done", sources))
    return boxes


@given(graphs())
def test_boxes_do_not_overlap_and_edges_go_right(boxes):
    places, routes = _layout(boxes)
    columns = _columns(places)
    for a, b in itertools.combinations(places, 2):
        if a.layer == b.layer:
            assert abs(a.y - b.y) >= (a.height + b.height) / 2, "rows"
    for place in places:
        assert columns[place.layer] + place.width < columns[place.layer + 1], "columns"
        assert place.y - place.height / 2 >= 0
    assert len(routes) == sum(len(box.sources) for box in boxes)
    for route in routes:
        layers = [places[i].layer for i in route]
        assert layers == list(range(layers[0], layers[-1] + 1))
        assert len(layers) >= 2
    root = ET.fromstring(svg(boxes))
    assert float(root.get("height")) >= max(place.y + place.height / 2 for place in places)


def points(path):
    """Places on an edge, from the arrow's start to its head."""
    numbers = [float(number) for number in re.findall(r"-?[0-9.]+", path)]
    corners = list(zip(numbers[::2], numbers[1::2], strict=True))
    for (x0, y0), (x1, y1), (x2, y2), (x3, y3) in zip(*(corners[i::3] for i in range(3)), corners[3::3], strict=False):
        for t in (i / 16 for i in range(17)):
            a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
            yield a * x0 + b * x1 + c * x2 + d * x3, a * y0 + b * y1 + c * y2 + d * y3


@given(graphs())
def test_edges_run_through_no_box(boxes):
    root = ET.fromstring(svg(boxes))
    rects = [
        tuple(float(rect.get(name)) for name in ("x", "y", "width", "height")) for rect in root.iter(f"{SVG}rect")
    ][1:]
    for edge in root.iter(f"{SVG}path"):
        if edge.get("class") == "edge":
            for x, y in points(edge.get("d")):
                for left, top, width, height in rects:
                    assert not (left + 1 < x < left + width - 1 and top + 1 < y < top + height - 1)
