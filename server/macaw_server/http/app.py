"""The Starlette app of a service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from macaw.errors import MacawError
from macaw_server.http.guard import Guard, on_http_exception, on_macaw_error
from macaw_server.http.openai import OpenAIEndpoints
from macaw_server.http.operations import OperationsEndpoints
from macaw_server.http.programs import ProgramEndpoints
from macaw_server.http.traces import TraceEndpoints
from macaw_server.service import ProgramService


def create_app(service: ProgramService) -> Starlette:
    """The app; its limits are in `service.config`, and its lifespan's end closes the service.

    A server should call `service.drain` as soon as it is told to end: the lifespan outlasts the connections.
    """
    routes = [
        *ProgramEndpoints(service).routes(),
        *OpenAIEndpoints(service).routes(),
        *TraceEndpoints(service).routes(),
        *OperationsEndpoints(service).routes(),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await service.close()

    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, service=service, routes={route.endpoint: route.path for route in routes})],
        exception_handlers={MacawError: on_macaw_error, HTTPException: on_http_exception},
        lifespan=lifespan,
    )
