"""For those who run the server: is it well, and what does it do. Nobody's text is shown, so no key."""

from __future__ import annotations

from http import HTTPStatus

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from macaw_server.service import ProgramService


class OperationsEndpoints:
    """Handlers of ``/health`` and ``/metrics``."""

    def __init__(self, service: ProgramService) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Path and handler of each."""
        return [Route("/health", self.health), Route("/metrics", self.metrics)]

    async def health(self, request: Request) -> Response:
        """200 where every engine works on requests and new ones are taken, else 503."""
        engines = {model.name: model.engine.status for model in self._service.models}
        if self._service.draining:
            status = "draining"
        else:
            status = "ok" if all(engine == "running" for engine in engines.values()) else "unavailable"
        code = HTTPStatus.OK if status == "ok" else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"status": status, "engines": engines}, code)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        await self._service.metrics.refresh(self._service.models)
        return Response(generate_latest(self._service.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
