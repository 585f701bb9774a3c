"""What surrounds every request: counting, OpenAI's error object for whatever goes wrong, and API keys."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from macaw.errors import InternalServerError, InvalidRequestError, MacawError, NotFoundError
from macaw_server.service import ProgramService, Tenant

log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]
TenantEndpoint = Callable[[Request, Tenant], Awaitable[Response]]
CLIENT_CLOSED_REQUEST = 499


def error_response(error: MacawError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer for an error."""
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error.to_wire()}, error.status, headers)


async def on_macaw_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for errors that are raised on purpose."""
    assert isinstance(error, MacawError), error
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler for its own: no such route, or not this method."""
    assert isinstance(error, HTTPException), error
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{request.method} {request.url.path} is not accepted; accepted: {headers.get('Allow')}."
        return error_response(InvalidRequestError(message, status=error.status_code), headers)
    if error.status_code == HTTPStatus.NOT_FOUND:
        routes = "/v1/programs, /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics"
        return error_response(NotFoundError(f"No route {request.url.path}. Macaw serves {routes}."), headers)
    return error_response(InvalidRequestError(error.detail, status=error.status_code), headers)


def authenticated(service: ProgramService, endpoint: TenantEndpoint) -> Endpoint:
    """An endpoint that knows whose request it is."""

    async def wrapped(request: Request) -> Response:
        tenant = service.tenants.authenticate(request.headers.get("authorization"))
        return await endpoint(request, tenant)

    return wrapped


class Guard:
    """Outermost middleware: counts requests, and answers a bug with `internal_error` rather than its details.

    Args:
        app: The rest.
        service: Has the metrics.
        routes: Path templates by endpoint, so that ids do not become labels. Filled by the app.
    """

    def __init__(self, app: ASGIApp, service: ProgramService, routes: Mapping[object, str]) -> None:
        self._app = app
        self._counter = service.metrics.http_requests
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST  # it left while it sent the body
        except Exception:
            log.exception("%s %s", scope["method"], scope["path"])
            if status:
                raise  # too late to say so: the server breaks the connection
            error = InternalServerError("A bug in the server broke this request; its log has the traceback.")
            await error_response(error)(scope, receive, noting)
        finally:
            route = self._routes.get(scope.get("endpoint"), "unknown")
            self._counter.labels(route, scope["method"], str(status)).inc()
