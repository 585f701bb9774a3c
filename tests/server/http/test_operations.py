"""Keys, limits, health and metrics of the app, in process."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.http.conftest import sse
from server.service.harness import MODEL, ScriptedEngine, call, until

PROGRAM = {"calls": [call("a", "Hi")], "targets": [{"variable": "a.out"}]}


def bearer(key):
    return {"authorization": f"Bearer {key}"}


class TestKeys:
    @pytest.fixture
    def api(self, make_api):
        return make_api(api_keys=("alice-key", "bob-key"))

    @pytest.mark.parametrize("headers", [{}, bearer("carol-key"), bearer(""), {"authorization": "Basic alice-key"}])
    async def test_wrong_keys(self, api, headers):
        for method, path in [
            ("GET", "/v1/models"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/programs/x"),
        ]:
            response = await api.http.request(method, path, headers=headers, json={})
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "unauthorized"
            assert response.headers["www-authenticate"] == "Bearer"
            assert "alice" not in response.text

    async def test_right_keys(self, api):
        for key in ("alice-key", "bob-key"):
            assert (await api.http.get("/v1/models", headers=bearer(key))).status_code == 200

    async def test_programs_and_cached_text_belong_to_the_key(self, api):
        alice = (await api.post("/v1/programs", PROGRAM, headers=bearer("alice-key"))).json()
        await api.post("/v1/programs", PROGRAM, headers=bearer("bob-key"))
        path = f"/v1/programs/{alice['id']}"
        for method, suffix in [("GET", ""), ("DELETE", ""), ("GET", "/events"), ("POST", "/calls")]:
            response = await api.http.request(method, path + suffix, headers=bearer("bob-key"), json={})
            assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
        assert (await api.http.get(path, headers=bearer("alice-key"))).status_code == 200
        of_alice, of_bob = (request.salt for request in api.engine.requests)
        assert of_alice != of_bob
        assert "alice-key" not in of_alice

    async def test_health_and_metrics_need_none(self, api):
        assert (await api.http.get("/health")).status_code == 200
        assert (await api.http.get("/metrics")).status_code == 200


class TestLimits:
    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/programs"])
    async def test_a_body_that_says_it_is_too_large(self, make_api, path):
        response = await make_api(max_body_bytes=100).http.post(path, content=b"x" * 101)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert "101 bytes were sent; the largest accepted body has 100" in response.json()["error"]["message"]

    async def test_a_body_that_does_not_say_so(self, make_api):
        sent = []

        async def endless():
            while True:
                sent.append(1)
                yield b" " * 60

        response = await make_api(max_body_bytes=100).http.post("/v1/programs", content=endless())
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
        assert len(sent) == 2

    async def test_overloaded(self, make_api):
        api = make_api(ScriptedEngine(held=True), max_live_calls=1)
        task = asyncio.create_task(api.chat())
        await until(lambda: api.engine.active)
        response = await api.chat()
        assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
        assert response.headers["retry-after"] == "60"
        api.engine.release()
        assert (await task).status_code == 200
        assert (await api.chat()).status_code == 200

    async def test_draining(self, make_api):
        api = make_api(ScriptedEngine(held=True))
        stream = asyncio.create_task(api.chat(stream=True))
        await until(lambda: api.engine.active)
        draining = asyncio.create_task(api.service.drain(60))
        await until(lambda: api.service.draining)
        response = await api.chat()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
        assert "retry-after" in response.headers
        health = await api.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        api.engine.release()
        await draining
        assert sse((await stream).text)[-1][2] == "[DONE]"


class TestHealth:
    async def test_well(self, api):
        response = await api.http.get("/health")
        assert response.json() == {"status": "ok", "engines": {MODEL: "running"}}

    @pytest.mark.parametrize("status", ["starting", "restarting", "failed", "stopped"])
    async def test_unwell(self, api, status):
        api.engine.status = status
        response = await api.http.get("/health")
        assert response.status_code == 503
        assert response.json() == {"status": "unavailable", "engines": {MODEL: status}}


class TestMetrics:
    async def read(self, api):
        families = text_string_to_metric_families((await api.http.get("/metrics")).text)
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    async def test_what_happens_is_counted(self, api):
        await api.chat(max_tokens=3)
        await api.chat(temperature=9)
        await api.http.get("/v1/programs/x")
        await api.http.get("/nowhere")
        samples = await self.read(api)
        assert samples["macaw_http_requests_total", "POST", "/v1/chat/completions", "200"] == 1
        assert samples["macaw_http_requests_total", "POST", "/v1/chat/completions", "400"] == 1
        assert samples["macaw_http_requests_total", "GET", "/v1/programs/{id}", "404"] == 1
        assert samples["macaw_http_requests_total", "GET", "unknown", "404"] == 1
        assert samples["macaw_programs_total", "completed"] == 1
        assert samples["macaw_calls_total", "completed"] == 1
        for histogram in ("queue_time", "time_to_first_token", "call_duration"):
            assert samples[f"macaw_{histogram}_seconds_count",] == 1

    async def test_live_programs(self, api):
        api.engine.hold()
        task = asyncio.create_task(api.post("/v1/programs", PROGRAM))
        await until(lambda: api.engine.active)
        samples = await self.read(api)
        assert (samples["macaw_live_programs",], samples["macaw_live_calls",]) == (1, 1)
        api.engine.fail("engine_failed", "gone")
        await task
        samples = await self.read(api)
        assert (samples["macaw_live_programs",], samples["macaw_live_calls",]) == (0, 0)
        assert samples["macaw_programs_total", "engine_failed"] == 1
        assert samples["macaw_calls_total", "engine_failed"] == 1

    async def test_the_engine_is_asked(self, api):
        samples = await self.read(api)
        assert samples["macaw_engine_steps_total", MODEL] == 7
        assert samples["macaw_cached_prompt_tokens_total", MODEL] == 40
        assert samples["macaw_preemptions_total", MODEL] == 3
        assert samples["macaw_step_time_ms", MODEL, "fixed"] == 2.5
        assert samples["macaw_engine_up", MODEL] == 1


async def test_a_bug_is_logged_and_not_shown(api, caplog, monkeypatch):
    def bug(*args):
        raise KeyError("secret detail")

    monkeypatch.setattr(api.service, "list", bug)
    response = await api.http.get("/v1/programs")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert "secret detail" in caplog.text
    assert "Traceback" in caplog.text
