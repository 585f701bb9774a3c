"""What the server answers about programs."""

from __future__ import annotations

from typing import Any, Literal

from macaw.errors import InvalidRequestError
from macaw.protocol.base import WireModel
from macaw.protocol.events import CallTimings, ErrorBody, Totals
from macaw.protocol.programs import Target, Transform


class CallState(WireModel):
    """A call in ``GET /v1/programs/{id}`` and in the answer of a program without a stream."""

    id: str
    status: Literal["waiting", "ready", "running", "completed", "failed"]
    inputs: list[str]
    output: str
    depth: int
    group: str | None = None
    timings: CallTimings
    completion: dict[str, Any] | None = None
    error: ErrorBody | None = None


class ProgramState(WireModel):
    """Answer of ``GET /v1/programs/{id}`` and of ``POST /v1/programs`` with ``stream: false``."""

    id: str
    status: Literal["running", "completed", "failed"]
    model: str
    calls: list[CallState]
    transforms: list[Transform]
    targets: list[Target]
    variables: dict[str, str]
    error: ErrorBody | None = None
    critical_path: list[str]
    totals: Totals
    duration_ms: float
    metadata: dict[str, str]

    def result(self) -> dict[str, str]:
        """The targets' values by name.

        Raises:
            MacawError: The program failed; the class says how.
            InvalidRequestError: The program still runs.
        """
        if self.error is not None:
            raise self.error.to_exception()
        if self.status == "running":
            raise InvalidRequestError(
                f"Program {self.id} is still running and has no result yet. Wait for its end with "
                f"client.events({self.id!r}).result()."
            )
        return {target.variable: self.variables[target.variable] for target in self.targets}


class ProgramList(WireModel):
    """Answer of ``GET /v1/programs``."""

    object: Literal["list"] = "list"
    data: list[ProgramState]
