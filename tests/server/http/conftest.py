import asyncio
import json
import socket
import threading

import httpx
import pytest
import uvicorn

from macaw_server.http import create_app
from server.service.harness import ScriptedEngine, make_service


class Api:
    """The app in this process: requests to it, and the engine behind it."""

    def __init__(self, engine, service):
        self.engine = engine
        self.service = service
        transport = httpx.ASGITransport(create_app(service))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://macaw")

    async def post(self, path, body, **kwargs):
        return await self.http.post(path, json=body, **kwargs)

    async def chat(self, content="Hi", headers=None, **fields):
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return await self.post("/v1/chat/completions", body, headers=headers)


@pytest.fixture
async def make_api():
    """Makes the app over a scripted engine."""
    apis = []

    def factory(engine=None, **config):
        engine = engine or ScriptedEngine()
        apis.append(Api(engine, make_service(engine, **config)))
        return apis[-1]

    yield factory
    for api in apis:
        await api.http.aclose()
        await api.service.close()


@pytest.fixture
async def api(make_api):
    return make_api()


class LiveServer:
    """The app on a real socket, its event loop in a thread."""

    def __init__(self, engine, **config):
        self.engine = engine
        self._config = config
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *exc_info):
        self._server.should_exit = True
        self._thread.join()

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        self.service = make_service(self.engine, **self._config)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            app = create_app(self.service)
            self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
            self._ready.set()
            await self._server.serve([sock])

    def run(self, coroutine):
        """Run something on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)


@pytest.fixture
def live():
    with LiveServer(
        ScriptedEngine({"Count": "one two three four", "unicode": "na\u00efve \U0001f99c caf\u00e9"})
    ) as server:
        yield server


def sse(text):
    """The events of a body: (id, event, data)."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            data = fields["data"]
            events.append((fields.get("id"), fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return events
