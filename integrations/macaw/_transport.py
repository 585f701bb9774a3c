"""What the synchronous and the asynchronous client share: requests, answers, errors, waits. No I/O."""

from __future__ import annotations

import json
import os
import random
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx

from macaw.errors import (
    ConnectionFailedError,
    MacawError,
    OverloadedError,
    ServerError,
    error_class_of_status,
    error_from_wire,
)
from macaw.protocol import (
    ProgramGrowth,
    ProgramList,
    ProgramRequest,
    ProgramState,
    VariableValue,
    WireModel,
)

T = TypeVar("T")

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
CONNECT_TIMEOUT_S = 10.0
MAX_BACKOFF_S = 10.0
KEEPALIVE_S = 4.0
"""Less than uvicorn's 5 s, so that no request goes out on a connection that the server is closing."""


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """One HTTP request and how to read its answer.

    Attributes:
        method: HTTP method.
        path: Path below the server's root, already quoted.
        parse: From the answer's body; ValueError, KeyError or TypeError: it is not a Macaw server's.
        body: JSON, or None for a request without a body.
        after: Query parameter of the events endpoint.
        stream: The answer is read as server-sent events, not by `parse`.
        repeatable: Sending it twice does no harm, so it is sent again when the server is overloaded.
    """

    method: str
    path: str
    parse: Callable[[bytes], T]
    body: bytes | None = None
    after: int | None = None
    stream: bool = False
    repeatable: bool = False

    def is_answered_by(self, response: httpx.Response) -> bool:
        """Whether it succeeded; a stream must also say that it is one."""
        kind = str(response.headers.get("content-type", ""))
        return response.is_success and (not self.stream or kind.startswith("text/event-stream"))


def post_program(request: ProgramRequest, *, stream: bool) -> Operation[ProgramState]:
    """``POST /v1/programs``, always with an idempotency key, so that a second try never runs it twice."""
    key = request.idempotency_key or uuid4().hex
    body = _json(request.model_copy(update={"stream": stream, "idempotency_key": key}))
    return Operation("POST", "/v1/programs", ProgramState.model_validate_json, body, stream=stream, repeatable=True)


def get_events(program_id: str, *, after: int) -> Operation[None]:
    """``GET /v1/programs/{id}/events``: the events with a sequence number over `after`."""
    return Operation("GET", f"{_program_path(program_id)}/events", _no_content, after=after, stream=True)


def get_program(program_id: str) -> Operation[ProgramState]:
    """``GET /v1/programs/{id}``."""
    return Operation("GET", _program_path(program_id), ProgramState.model_validate_json)


def list_programs() -> Operation[list[ProgramState]]:
    """``GET /v1/programs``."""
    return Operation("GET", "/v1/programs", lambda body: ProgramList.model_validate_json(body).data)


def grow(program_id: str, growth: ProgramGrowth) -> Operation[None]:
    """``POST /v1/programs/{id}/calls``."""
    path = f"{_program_path(program_id)}/calls"
    return Operation("POST", path, _no_content, _json(growth))


def set_variable(program_id: str, name: str, value: str) -> Operation[None]:
    """``PUT /v1/programs/{id}/variables/{name}``."""
    path = f"{_program_path(program_id)}/variables/{quote(name, safe='')}"
    return Operation("PUT", path, _no_content, _json(VariableValue(value=value)))


def cancel(program_id: str) -> Operation[None]:
    """``DELETE /v1/programs/{id}``."""
    return Operation("DELETE", _program_path(program_id), _no_content)


def models() -> Operation[list[str]]:
    """``GET /v1/models``."""
    return Operation("GET", "/v1/models", lambda body: [str(model["id"]) for model in json.loads(body)["data"]])


def health() -> Operation[dict[str, Any]]:
    """``GET /health``."""
    return Operation("GET", "/health", lambda body: dict(json.loads(body)))


def _program_path(program_id: str) -> str:
    return f"/v1/programs/{quote(program_id, safe='')}"


def _json(model: WireModel) -> bytes:
    return model.model_dump_json(exclude_none=True).encode()


def _no_content(body: bytes) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server is and how patient the client is.

    Attributes:
        root: The URL without the trailing ``/v1``.
        headers: Sent with every request.
        timeout_s: Longest silence while waiting for an answer or the next part of it.
        max_retries: How often a program is posted again after the server said that it is overloaded.
        max_reconnects: How often in a row a broken stream is taken up again.
        backoff_s: First wait, where the server does not say how long; doubles up to `MAX_BACKOFF_S`.
    """

    root: str
    headers: dict[str, str] = field(repr=False)
    timeout_s: float
    max_retries: int
    max_reconnects: int
    backoff_s: float

    @classmethod
    def resolve(cls, base_url: str | None, api_key: str | None, **patience: Any) -> Endpoint:
        """Take what is None from `MACAW_BASE_URL` and `MACAW_API_KEY`; the URL may end in ``/v1`` or not."""
        url = base_url or os.environ.get("MACAW_BASE_URL") or DEFAULT_BASE_URL
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"base_url {url!r} has no scheme. Give a URL such as {DEFAULT_BASE_URL!r}.")
        key = api_key or os.environ.get("MACAW_API_KEY")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return cls(url.rstrip("/").removesuffix("/v1").rstrip("/"), headers, **patience)

    def http_options(self) -> dict[str, Any]:
        """Keyword arguments of an httpx client."""
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100, keepalive_expiry=KEEPALIVE_S)
        if self.root.startswith("https:"):
            return {"limits": limits}
        # Loading the trusted certificates takes 50 ms, for nothing where all is http. This one trusts nobody.
        return {"limits": limits, "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}

    def request_arguments(self, operation: Operation[Any]) -> dict[str, Any]:
        """Keyword arguments of httpx's `build_request`."""
        headers = dict(self.headers)
        headers["accept"] = "text/event-stream" if operation.stream else "application/json"
        if operation.body is not None:
            headers["content-type"] = "application/json"
        return {
            "method": operation.method,
            "url": self.root + operation.path,
            "params": None if operation.after is None else {"after": operation.after},
            "content": operation.body,
            "headers": headers,
            "timeout": httpx.Timeout(self.timeout_s, connect=min(self.timeout_s, CONNECT_TIMEOUT_S)),
        }

    def parse(self, operation: Operation[T], response: httpx.Response) -> T:
        """Read the answer of a request that succeeded."""
        try:
            return operation.parse(response.content)
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{response.url} answered {response.status_code}, but not as a Macaw server does: {error}. "
                "Check base_url, and that server and client are of the same version."
            ) from error

    @contextmanager
    def connection_errors(self) -> Iterator[None]:
        """Turn httpx's exceptions into Macaw's."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ConnectionFailedError(
                f"No Macaw server at {self.root} ({error or type(error).__name__}). "
                "Start one with: macaw serve MODEL --port N, or pass base_url."
            ) from error
        except httpx.TimeoutException as error:
            raise ConnectionFailedError(
                f"{self.root} sent nothing for {self.timeout_s:g} s ({type(error).__name__}). "
                "Pass a larger timeout_s, or see whether the server is stuck."
            ) from error
        except httpx.RequestError as error:
            raise ConnectionFailedError(
                f"The connection to {self.root} broke: {error or type(error).__name__}. The server's log may say why."
            ) from error

    def retry_wait_s(self, operation: Operation[Any], error: MacawError, attempt: int) -> float:
        """Seconds until the operation's next try; raises `error` where there is none. `attempt`: 0, 1, ..."""
        again = operation.repeatable and isinstance(error, OverloadedError) and attempt < self.max_retries
        if not again or (error.retry_after_s or 0) > self.timeout_s:
            raise error
        return self.wait_s(error, attempt)

    def wait_s(self, error: MacawError, attempt: int) -> float:
        """As long as the server says, else exponential backoff, with jitter lest clients come back as one."""
        if error.retry_after_s is not None:
            return error.retry_after_s
        return min(self.backoff_s * 2.0**attempt, MAX_BACKOFF_S) * random.uniform(0.5, 1.0)


def error_from_response(response: httpx.Response) -> MacawError:
    """The exception for an answer that is none to its operation; the body must have been read."""
    status, retry_after_s = response.status_code, _retry_after_s(response.headers.get("retry-after"))
    try:
        error = response.json()["error"]
        return error_from_wire(dict(error), status=status, retry_after_s=retry_after_s)
    except (ValueError, KeyError, TypeError):
        kind = response.headers.get("content-type", "no content type")
        return error_class_of_status(status)(
            f"{response.url} answered {status} {response.reason_phrase} with {kind}, which is not a Macaw "
            f"server's answer. Check base_url and any proxy in between. It begins: {response.text[:200]!r}",
            status=status,
            retry_after_s=retry_after_s,
        )


def _retry_after_s(value: str | None) -> float | None:
    """`Retry-After`: seconds, or a date (RFC 9110, section 10.2.3); None where it is missing or neither."""
    try:
        return max(0.0, float(value or ""))
    except ValueError:
        pass
    try:
        seconds = (parsedate_to_datetime(value or "") - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return None
    return max(0.0, seconds)
