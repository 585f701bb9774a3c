"""What distributes calls over engines, and the plain way of doing it: by the number of calls. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from typing import NamedTuple

from macaw_server.engine.types import EngineRequest


class Move(NamedTuple):
    """A call that another engine should run."""

    request_id: str
    source: int
    target: int


class Placer(ABC):
    """Chooses engines, which are numbered from 0 and all alive at first; is told when requests start and end."""

    @abstractmethod
    def place(self, request: EngineRequest) -> int:
        """Choose the engine for a request, which the caller then sends there.

        Raises:
            RuntimeError: No engine is alive.
        """

    @abstractmethod
    def ended(self, request: EngineRequest, output_ids: Seq[int]) -> None:
        """A request has ended, or was aborted; what it computed stays in its engine's cache."""

    @abstractmethod
    def lose(self, engine: int) -> list[str]:
        """An engine is gone, and its cache; returns the requests it had, which are to be placed anew."""

    @abstractmethod
    def restore(self, engine: int) -> None:
        """An engine is there again, with an empty cache."""

    def admitted(self, request_id: str) -> None:  # noqa: B027
        """A request has entered a batch: it waits no more."""

    def started(self, request_id: str) -> None:  # noqa: B027
        """A request has its first token: its prompt is computed."""

    def moves(self, target: int) -> list[Move]:
        """Calls that are done sooner at an engine where nobody waits; they count as placed there from now on."""
        return []


class LeastLoaded(Placer):
    """What a load balancer does that knows nothing of the calls: fewest live ones first, in turn where that is equal.

    Args:
        num_engines: At least 1.
    """

    def __init__(self, num_engines: int) -> None:
        self._engines: dict[str, int] = {}
        self._num_calls = [0] * num_engines
        self._last_turns = [0] * num_engines
        self._turn = 0
        self._alive = set(range(num_engines))

    def place(self, request: EngineRequest) -> int:
        """By the number of calls."""
        if not self._alive:
            raise RuntimeError("No engine is alive; restore one before placing requests.")
        engine = min(self._alive, key=lambda engine: (self._num_calls[engine], self._last_turns[engine], engine))
        self._turn += 1
        self._last_turns[engine] = self._turn
        self._num_calls[engine] += 1
        self._engines[request.request_id] = engine
        return engine

    def ended(self, request: EngineRequest, output_ids: Seq[int]) -> None:
        """One call less."""
        if (engine := self._engines.pop(request.request_id, None)) is not None:
            self._num_calls[engine] -= 1

    def lose(self, engine: int) -> list[str]:
        """Its calls are nowhere."""
        self._alive.discard(engine)
        self._num_calls[engine] = 0
        lost = [request_id for request_id, placed in self._engines.items() if placed == engine]
        for request_id in lost:
            del self._engines[request_id]
        return lost

    def restore(self, engine: int) -> None:
        """It takes part again."""
        self._alive.add(engine)
