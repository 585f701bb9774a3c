"""A scripted Macaw server on a real socket, and both clients behind one blocking face."""

import asyncio
import json
import socket
import threading
from collections import defaultdict, deque
from inspect import iscoroutinefunction
from typing import NamedTuple

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

import macaw
from macaw.async_client import AsyncMacawClient, AsyncProgramStream
from macaw.client import MacawClient
from macaw.functions import driver


class Seen(NamedTuple):
    """A request as the server saw it."""

    method: str
    path: str
    query: dict
    headers: dict
    body: object
    client_port: int


class ScriptedServer:
    """Gives the scripted answers to each (method, path), first in, first out."""

    def __init__(self, sock):
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self.reset()

    def reset(self):
        self.seen = []
        self.disconnected = threading.Event()
        self._answers = defaultdict(deque)

    def answer(self, method, path, body, status=200, **headers):
        """Answer with JSON, or with a string as HTML."""
        kind = "text/html" if isinstance(body, str) else "application/json"
        content = body if isinstance(body, str) else json.dumps(body)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self._script(method, path, lambda request: Response(content, status, headers, kind))

    def answer_events(self, method, path, events, then="end"):
        """Answer with events (or raw bytes), then "end" the body, "drop" the connection or "hold" it."""

        async def stream(request):
            for event in events:
                yield event if isinstance(event, bytes) else encode(event)
            if then == "drop":
                raise ConnectionAbortedError("scripted: uvicorn closes the socket in the middle of the body")
            if then == "hold":
                await self._wait_for_disconnect(request)

        self._script(method, path, lambda request: StreamingResponse(stream(request), media_type="text/event-stream"))

    def answer_never(self, method, path):
        """Leave the request without an answer."""
        self._script(method, path, self._wait_for_disconnect)

    def _script(self, method, path, make_answer):
        self._answers[method, path].append(make_answer)

    async def _wait_for_disconnect(self, request):
        try:
            while (await request.receive())["type"] != "http.disconnect":
                pass
        finally:  # Starlette may see the disconnect first and cancel this
            self.disconnected.set()
        return Response(status_code=499)

    async def __call__(self, request):
        body = await request.body()
        self.seen.append(
            Seen(
                request.method,
                request.scope["raw_path"].decode(),
                dict(request.query_params),
                dict(request.headers),
                json.loads(body) if body else None,
                request.client.port,
            )
        )
        make_answer = self._answers[request.method, request.url.path].popleft()
        answer = make_answer(request)
        return await answer if asyncio.iscoroutine(answer) else answer


def encode(event):
    """An event's server-sent form, as the server writes it."""
    return f"id: {event.sequence}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()


@pytest.fixture(scope="session")
def running_server():
    sock = socket.create_server(("127.0.0.1", 0))
    script = ScriptedServer(sock)

    async def endpoint(request):
        return await script(request)

    methods = ["GET", "POST", "PUT", "DELETE"]
    app = Starlette(routes=[Route("/{path:path}", endpoint, methods=methods)])
    config = uvicorn.Config(app, lifespan="off", log_config=None, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    yield script
    server.should_exit = True
    thread.join()
    sock.close()


@pytest.fixture
def server(running_server):
    running_server.reset()
    return running_server


class Blocking:
    """An `AsyncMacawClient` or `AsyncProgramStream` with the face of its synchronous twin."""

    def __init__(self, target, runner):
        self._target = target
        self._runner = runner

    def __getattr__(self, name):
        value = getattr(self._target, name)
        if not iscoroutinefunction(value):
            return value

        def call(*args, **kwargs):
            answer = self._runner.run(value(*args, **kwargs))
            return Blocking(answer, self._runner) if isinstance(answer, AsyncProgramStream) else answer

        return call

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return self._runner.run(self._target.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self):
        self._runner.run(self._target.__aenter__())
        return self

    def __exit__(self, *exc_info):
        self._runner.run(self._target.__aexit__(*exc_info))


@pytest.fixture(params=["sync", "async"])
def connect(request, server):
    """Makes clients of the scripted server, of both kinds; nothing waits between retries."""
    clients = []
    with asyncio.Runner() as runner:

        def connect(base_url=server.url, **options):
            options = {"backoff_s": 0.0, **options}
            if request.param == "sync":
                client = MacawClient(base_url, **options)
            else:
                client = Blocking(AsyncMacawClient(base_url, **options), runner)
            clients.append(client)
            return client

        yield connect
        for client in clients:
            client.close()


@pytest.fixture
def client(connect):
    return connect()


@pytest.fixture
def session(server):
    with macaw.session(server.url) as session:
        yield session


@pytest.fixture
def quick_end(monkeypatch):
    monkeypatch.setattr(driver, "END_TIMEOUT_S", 0.0)  # a scripted stream may not end
