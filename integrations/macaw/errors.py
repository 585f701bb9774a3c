"""The exceptions of Macaw: one tree, shared by client and server.

::

    MacawError
    ├── RequestError            the request is wrong; sending it again cannot help (4xx)
    │   ├── InvalidRequestError      invalid_request, unsupported_parameter, request_too_large
    │   ├── InvalidProgramError      invalid_program, unknown_variable, cycle
    │   ├── ContextLengthError       context_length_exceeded
    │   ├── UnknownModelError        unknown_model
    │   ├── UnauthorizedError        unauthorized
    │   └── NotFoundError            not_found
    ├── CallError               a call or a program ended without its answer
    │   ├── UpstreamFailedError      upstream_failed
    │   ├── NativeFunctionError      native_function_failed
    │   ├── CancelledError           cancelled
    │   └── DeadlineExceededError    deadline_exceeded
    ├── ServerError             the server could not do it; trying again later may help (5xx, 429)
    │   ├── OverloadedError          overloaded
    │   ├── EngineFailedError        engine_failed
    │   └── InternalServerError      internal_error
    └── ConnectionFailedError   no server answered, or the connection broke

Every class but the inner nodes stands for the wire codes beside it; `error_from_wire` picks the class by
code, and `MacawError.to_wire` writes OpenAI's error object, so both ends raise the same thing.
"""

from __future__ import annotations

from typing import Any, ClassVar


class MacawError(Exception):
    """Base of all errors that Macaw raises on purpose.

    Args:
        message: What was seen, what is accepted, and what to do.
        code: The wire code; a class has a default.
        param: The path of the offending field, such as ``calls[2].request.messages[0]``.
        status: The HTTP status it travels with; a class has a default.
        retry_after_s: Seconds after which a retry makes sense, where the server knows.
    """

    default_code: ClassVar[str] = "internal_error"
    default_status: ClassVar[int] = 500
    wire_type: ClassVar[str] = "server_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.status = status or self.default_status
        self.retry_after_s = retry_after_s

    def to_wire(self) -> dict[str, Any]:
        """OpenAI's error object: ``{"message", "type", "param", "code"}``."""
        return {"message": self.message, "type": self.wire_type, "param": self.param, "code": self.code}

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross process boundaries, so pickling keeps every field."""
        state = (type(self), self.message, self.code, self.param, self.status, self.retry_after_s)
        return _rebuild, state


def _rebuild(
    cls: type[MacawError],
    message: str,
    code: str,
    param: str | None,
    status: int,
    retry_after_s: float | None,
) -> MacawError:
    return cls(message, code=code, param=param, status=status, retry_after_s=retry_after_s)


class RequestError(MacawError):
    """The request is wrong; sending it again cannot help."""

    default_code = "invalid_request"
    default_status = 400
    wire_type = "invalid_request_error"


class InvalidRequestError(RequestError):
    """A field is unknown, of the wrong type, out of range or not supported, or the body is too large."""


class InvalidProgramError(RequestError):
    """The program is not a well-formed graph: `param` is the path of the offending field."""

    default_code = "invalid_program"


class ContextLengthError(RequestError):
    """Prompt plus requested output is over the model's context; the message has both numbers."""

    default_code = "context_length_exceeded"


class UnknownModelError(RequestError):
    """The model is not served; the message names those that are."""

    default_code = "unknown_model"
    default_status = 404


class UnauthorizedError(RequestError):
    """The API key is missing or not one of the server's."""

    default_code = "unauthorized"
    default_status = 401


class NotFoundError(RequestError):
    """No such route, program or variable (also: another tenant's program)."""

    default_code = "not_found"
    default_status = 404


class CallError(MacawError):
    """A call or a program ended without its answer."""

    wire_type = "call_error"
    default_code = "upstream_failed"
    default_status = 424


class UpstreamFailedError(CallError):
    """A call that this value depends on failed; the message names the root call and its error."""


class NativeFunctionError(CallError):
    """A native function raised; `__cause__` is what. Never on the wire: native functions run in the client."""

    default_code = "native_function_failed"


class CancelledError(CallError):
    """The program was cancelled by its client."""

    default_code = "cancelled"
    default_status = 499


class DeadlineExceededError(CallError):
    """The deadline passed before the answer was there."""

    default_code = "deadline_exceeded"
    default_status = 504


class ServerError(MacawError):
    """The server could not do it; trying again later may help."""


class OverloadedError(ServerError):
    """The queue is full; `retry_after_s` says when to come back."""

    default_code = "overloaded"
    default_status = 429
    wire_type = "rate_limit_error"


class EngineFailedError(ServerError):
    """The engine process died and could not be brought back, or this call kills it each time."""

    default_code = "engine_failed"
    default_status = 503


class InternalServerError(ServerError):
    """A bug in the server; its log has the traceback."""


class ConnectionFailedError(MacawError):
    """No server answered at the URL, or the connection broke before the answer was complete."""

    default_code = "connection_failed"
    default_status = 0
    wire_type = "connection_error"


_BY_CODE: dict[str, type[MacawError]] = {
    "invalid_request": InvalidRequestError,
    "unsupported_parameter": InvalidRequestError,
    "request_too_large": InvalidRequestError,
    "invalid_program": InvalidProgramError,
    "unknown_variable": InvalidProgramError,
    "cycle": InvalidProgramError,
    "context_length_exceeded": ContextLengthError,
    "unknown_model": UnknownModelError,
    "unauthorized": UnauthorizedError,
    "not_found": NotFoundError,
    "upstream_failed": UpstreamFailedError,
    "cancelled": CancelledError,
    "deadline_exceeded": DeadlineExceededError,
    "overloaded": OverloadedError,
    "engine_failed": EngineFailedError,
    "internal_error": InternalServerError,
}


def error_from_wire(
    error: dict[str, Any], *, status: int | None = None, retry_after_s: float | None = None
) -> MacawError:
    """Build the exception for an error object; a foreign code is kept, and the status picks the class."""
    code = str(error.get("code") or "")
    return (_BY_CODE.get(code) or error_class_of_status(status))(
        str(error.get("message") or ""),
        code=code,
        param=error.get("param"),
        status=status,
        retry_after_s=retry_after_s,
    )


def error_class_of_status(status: int | None) -> type[MacawError]:
    """The class for an HTTP status alone: answers of proxies and other servers have no code of ours."""
    if status is None:
        return MacawError
    if not 400 <= status < 500:
        return ServerError
    return {401: UnauthorizedError, 403: UnauthorizedError, 404: NotFoundError, 429: OverloadedError}.get(
        status, RequestError
    )
