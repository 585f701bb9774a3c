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
        NativeFunctionError,
        NotFoundError,
        OverloadedError,
        RequestError,
        ServerError,
        UnauthorizedError,
        UnknownModelError,
        UpstreamFailedError,
    )
    from macaw.functions.function import Function, Input, Output, Sampling, function
    from macaw.functions.native import NativeFunction, native_function
    from macaw.functions.program import Program
    from macaw.functions.session import Session, current_session, session, variable
    from macaw.functions.variable import SemanticVariable, join
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
    "Function",
    "Input",
    "InternalServerError",
    "InvalidProgramError",
    "InvalidRequestError",
    "MacawClient",
    "MacawError",
    "NativeFunction",
    "NativeFunctionError",
    "NotFoundError",
    "Output",
    "OverloadedError",
    "Program",
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
    "Sampling",
    "SemanticVariable",
    "ServerError",
    "Session",
    "UnauthorizedError",
    "UnknownModelError",
    "UpstreamFailedError",
    "VariableResolved",
    "__version__",
    "current_session",
    "function",
    "join",
    "native_function",
    "session",
    "variable",
]

_HOMES = {
    "AsyncMacawClient": "async_client",
    "AsyncProgramStream": "async_client",
    "MacawClient": "client",
    "ProgramStream": "client",
    "ProgramBuilder": "builder",
    "Ref": "builder",
    "Function": "functions.function",
    "Input": "functions.function",
    "Output": "functions.function",
    "Sampling": "functions.function",
    "function": "functions.function",
    "NativeFunction": "functions.native",
    "native_function": "functions.native",
    "Program": "functions.program",
    "Session": "functions.session",
    "current_session": "functions.session",
    "session": "functions.session",
    "variable": "functions.session",
    "SemanticVariable": "functions.variable",
    "join": "functions.variable",
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
