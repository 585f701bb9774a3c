"""The program endpoints."""

from __future__ import annotations

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from macaw.errors import CancelledError, InvalidRequestError
from macaw.protocol import ProgramList, WireModel
from macaw_server.http.guard import CLIENT_CLOSED_REQUEST, authenticated
from macaw_server.http.parsing import parse_growth, parse_program, parse_variable, read_json
from macaw_server.http.streams import ProgramStream, program_events, wait_for_end
from macaw_server.service import ProgramService, Tenant


class ProgramEndpoints:
    """Handlers under ``/v1/programs``."""

    def __init__(self, service: ProgramService) -> None:
        self._service = service
        self._config = service.config

    def routes(self) -> list[Route]:
        """Path, handler and methods of each."""
        table = [
            ("/v1/programs", self.create, "POST"),
            ("/v1/programs", self.list, "GET"),
            ("/v1/programs/{id}", self.get, "GET"),
            ("/v1/programs/{id}", self.cancel, "DELETE"),
            ("/v1/programs/{id}/events", self.events, "GET"),
            ("/v1/programs/{id}/calls", self.grow, "POST"),
            ("/v1/programs/{id}/variables/{name:path}", self.set_variable, "PUT"),
        ]
        return [
            Route(path, authenticated(self._service, endpoint), methods=[method]) for path, endpoint, method in table
        ]

    async def create(self, request: Request, tenant: Tenant) -> Response:
        """Start a program; answer with its events, or at its end with its state."""
        program = parse_program(await read_json(request, self._config.max_body_bytes))
        run = await self._service.submit(tenant, program)
        if program.stream:
            return ProgramStream(run, program_events(run, -1), ping_s=self._config.ping_s)
        if not await wait_for_end(run, request):
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return _json(run.state)

    async def list(self, request: Request, tenant: Tenant) -> Response:
        """The states of all programs that are remembered."""
        return _json(ProgramList(data=list(self._service.states(tenant))))

    async def get(self, request: Request, tenant: Tenant) -> Response:
        """A program's state."""
        return _json(self._service.state(tenant, request.path_params["id"]))

    async def cancel(self, request: Request, tenant: Tenant) -> Response:
        """End a program; one that has ended stays as it is."""
        program_id = request.path_params["id"]
        self._service.cancel(tenant, program_id, CancelledError("The program was cancelled by DELETE."))
        return _json(self._service.state(tenant, program_id))

    async def events(self, request: Request, tenant: Tenant) -> Response:
        """A program's events behind number `after`."""
        after = _after(request)
        run = self._service.get(tenant, request.path_params["id"])
        return ProgramStream(run, program_events(run, after), ping_s=self._config.ping_s)

    async def grow(self, request: Request, tenant: Tenant) -> Response:
        """Add to a program, or close it."""
        run = self._service.get(tenant, request.path_params["id"])
        growth = parse_growth(await read_json(request, self._config.max_body_bytes))
        await self._service.grow(run, growth)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    async def set_variable(self, request: Request, tenant: Tenant) -> Response:
        """Set an external variable."""
        run = self._service.get(tenant, request.path_params["id"])
        body = parse_variable(await read_json(request, self._config.max_body_bytes))
        run.set_variable(request.path_params["name"], body.value)
        return Response(status_code=HTTPStatus.NO_CONTENT)


def _after(request: Request) -> int:
    value = request.query_params.get("after", request.headers.get("last-event-id", "-1"))
    try:
        after = int(value)
    except ValueError:
        after = -2
    if after < -1:
        raise InvalidRequestError(
            f"after={value!r} is not a sequence number. Give that of the last event you have, or -1.",
            param="after",
        )
    return after


def _json(model: WireModel) -> Response:
    return Response(model.model_dump_json(exclude_none=True), media_type="application/json")
