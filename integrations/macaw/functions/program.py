"""What a session has built, to look at: a picture of the graph, and where the time went."""

from __future__ import annotations

import asyncio
from typing import Any

from macaw.client import MacawClient
from macaw.functions.drawing import Box, Pictured
from macaw.functions.graph import Call, Graph, Node
from macaw.functions.variable import SemanticVariable
from macaw.timeline import Timeline


class Program(Pictured):
    """A session's program so far. In a notebook it shows itself as a picture.

    Attributes:
        id: The server's; None while nothing has been sent.
    """

    def __init__(self, graph: Graph, program_id: str | None, server: dict[str, Any]) -> None:
        self.id = program_id
        self._graph = graph
        self._server = server

    def trace(self) -> Timeline:
        """When each call waited, prefilled and wrote, as the server tells it now.

        Raises:
            RuntimeError: Nothing has been sent yet.
            MacawError: The server does not answer, or has forgotten the program.
        """
        if self.id is None:
            raise RuntimeError("Nothing has been sent yet, so there is no timeline. Ask for a variable first.")
        with MacawClient(**self._server) as client:
            return Timeline(client.get_program(self.id))

    async def atrace(self) -> Timeline:
        """`trace` for asyncio."""
        return await asyncio.to_thread(self.trace)

    def __repr__(self) -> str:
        return f"<Program {self.id or '(not sent)'}: {len(self._graph.nodes)} calls and steps>"

    def _boxes(self) -> list[Box]:
        """A box for every variable that the client sets, and for every call and step; producers first."""
        nodes = list(self._graph.nodes)
        makers: dict[SemanticVariable, int] = {}
        boxes: list[Box] = []
        for node in nodes:
            for variable in node.inputs:
                if variable not in makers:
                    makers[variable] = len(boxes)
                    boxes.append(Box(variable.name, _excerpt(variable), "variable", _state([variable])))
            sources = [makers[variable] for variable in _new_inputs(node)]
            makers |= dict.fromkeys(node.outputs, len(boxes))
            boxes.append(_box(node, sources, self._graph))
        return boxes


def _new_inputs(node: Node) -> list[SemanticVariable]:
    """A node's inputs; an output that goes on where another one of its prompt ended hides what that one read."""
    inputs = node.inputs
    if isinstance(node, Call):
        for variable in reversed(inputs):
            earlier = variable.producer
            if isinstance(earlier, Call) and node.parts[: len(earlier.parts)] == earlier.parts:
                return [v for v in inputs if v not in earlier.inputs]
    return inputs


def _box(node: Node, sources: list[int], graph: Graph) -> Box:
    asks = [graph.asks[output].objective for output in node.outputs if output in graph.asks]
    note = ", ".join(output.name for output in node.outputs)
    kind = "call" if isinstance(node, Call) else "step"
    return Box(node.function, note, kind, _state(node.outputs), list(dict.fromkeys(sources)), asks[0] if asks else "")


def _excerpt(variable: SemanticVariable) -> str:
    if not variable.ready or variable.future.exception() is not None:
        return "to be set" if variable.producer is None else "of another session"
    text = " ".join(variable.future.result()[:60].split())
    return text if len(text) <= 24 else text[:23] + "…"


def _state(outputs: list[SemanticVariable]) -> str:
    if not all(output.ready for output in outputs):
        return "waiting"
    return "failed" if any(output.future.exception() for output in outputs) else "done"
