"""Macaw: serve LLM applications, not isolated requests. This package is the client side, in plain Python.

Names load when they are first used, so that ``import macaw`` is cheap: it brings neither pydantic nor httpx.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from macaw.async_client import AsyncMacawClient, AsyncProgramStream
    from macaw.builder import ProgramBuilder, Ref
    from macaw.client import MacawClient, ProgramStream
    from macaw.errors import (
        CallError,
        CancelledError,
        ConnectionFailedError,
        ContextLengthError,
        DeadlineExceededError,
        EngineFailedError,
        InternalServerError,
        InvalidProgramError,
        InvalidRequestError,
        MacawError,
        NotFoundError,
        OverloadedError,
        RequestError,
        ServerError,
        UnauthorizedError,
        UnknownModelError,
        UpstreamFailedError,
    )
    from macaw.protocol import (
        AnyEvent,
        CallCompleted,
        CallDelta,
        CallFailed,
        CallStarted,
        ProgramCompleted,
        ProgramCreated,
        ProgramFailed,
        ProgramGrowth,
        ProgramRequest,
        ProgramState,
        VariableResolved,
    )

__version__ = "0.1.0"

__all__ = [
    "AnyEvent",
    "AsyncMacawClient",
    "AsyncProgramStream",
    "CallCompleted",
    "CallDelta",
    "CallError",
    "CallFailed",
    "CallStarted",
    "CancelledError",
    "ConnectionFailedError",
    "ContextLengthError",
    "DeadlineExceededError",
    "EngineFailedError",
    "InternalServerError",
    "InvalidProgramError",
    "InvalidRequestError",
    "MacawClient",
    "MacawError",
    "NotFoundError",
    "OverloadedError",
    "ProgramBuilder",
    "ProgramCompleted",
    "ProgramCreated",
    "ProgramFailed",
    "ProgramGrowth",
    "ProgramRequest",
    "ProgramState",
    "ProgramStream",
    "Ref",
    "RequestError",
    "ServerError",
    "UnauthorizedError",
    "UnknownModelError",
    "UpstreamFailedError",
    "VariableResolved",
    "__version__",
]

_HOMES = {
    "AsyncMacawClient": "async_client",
    "AsyncProgramStream": "async_client",
    "MacawClient": "client",
    "ProgramStream": "client",
    "ProgramBuilder": "builder",
    "Ref": "builder",
}


def __getattr__(name: str) -> Any:
    """Load an exported name (PEP 562). What has no other home is an error or a type of the wire protocol."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name) or ("errors" if name.endswith("Error") else "protocol")
    value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
