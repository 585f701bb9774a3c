"""The program endpoints, in process."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from macaw.protocol import ProgramList, ProgramState
from server.http.conftest import sse
from server.service.harness import ScriptedEngine, call, chat_prompt, until

CHAIN = {
    "calls": [call("draft", "Draft it."), call("polish", "Polish: ", "$draft.out")],
    "targets": [{"variable": "polish.out"}],
}
SCRIPT = {"Draft": "a draft", "Polish": "a polished text", "yes": "agreed"}


@pytest.fixture
def api(make_api):
    return make_api(ScriptedEngine(SCRIPT))


@asynccontextmanager
async def streaming(api, body):
    """Post a program; yields its id and the task whose result is its events."""
    task = asyncio.create_task(api.post("/v1/programs", body | {"stream": True}))
    await until(lambda: api.service._live or task.done())
    (run,) = api.service._live.values()
    yield run.id, task


async def test_answer_at_the_end(api):
    response = await api.post("/v1/programs", CHAIN | {"metadata": {"user": "me"}})
    assert response.status_code == 200
    state = ProgramState.model_validate_json(response.content)
    assert state.result() == {"polish.out": "a polished text"}
    assert [c.completion["choices"][0]["message"]["content"] for c in state.calls] == [
        "a draft",
        "a polished text",
    ]
    assert len({c.completion["id"] for c in state.calls}) == 2
    assert state.metadata == {"user": "me"}
    again = await api.http.get(f"/v1/programs/{state.id}")
    assert again.json() == response.json()
    assert ProgramList.model_validate_json((await api.http.get("/v1/programs")).content).data == [state]


async def test_events_are_in_the_order_of_what_happens(api):
    response = await api.post("/v1/programs", CHAIN | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = sse(response.text)
    assert [id_ for id_, _, _ in events] == [str(i) for i in range(len(events))]
    assert all(data["type"] == name and data["sequence"] == int(id_) for id_, name, data in events)
    names = [(name, data.get("call_id")) for _, name, data in events if name != "call.delta"]
    assert names == [
        ("program.created", None),
        ("call.started", "draft"),
        ("call.completed", "draft"),
        ("variable.resolved", None),
        ("call.started", "polish"),
        ("call.completed", "polish"),
        ("variable.resolved", None),
        ("program.completed", None),
    ]
    assert events[-1][2]["variables"] == {"polish.out": "a polished text"}


async def test_reconnecting_goes_on_behind_the_last_event(api):
    created, *_, last = sse((await api.post("/v1/programs", CHAIN | {"stream": True})).text)
    path = f"/v1/programs/{created[2]['program_id']}/events"
    everything = sse((await api.http.get(path)).text)
    assert everything[0] == created
    assert sse((await api.http.get(path, params={"after": 4})).text) == everything[5:]
    assert sse((await api.http.get(path, params={"after": last[0]})).text) == []
    assert sse((await api.http.get(path, headers={"last-event-id": "4"})).text) == everything[5:]
    for after in ("x", "-2", "1.5"):
        error = (await api.http.get(path, params={"after": after})).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_request", "after")


async def test_growing_by_answers_and_client_steps(api):
    body = {"calls": [call("draft", "Draft it.")], "open": True, "variables": {"ok?": {"external": True}}}
    refused = await api.post("/v1/programs", body | {"stream": True})
    assert refused.json()["error"]["param"] == "variables.ok?"
    body["variables"] = {"step/1": {"external": True}}
    async with streaming(api, body) as (program_id, task):
        growth = {
            "calls": [call("judge", "$draft.out", "? ", "$step/1")],
            "targets": [{"variable": "judge.out"}],
        }
        state = await api.post(f"/v1/programs/{program_id}/calls", growth)
        assert [c["id"] for c in state.json()["calls"]] == ["draft", "judge"]
        path = f"/v1/programs/{program_id}/variables"
        missing = await api.http.put(f"{path}/nope", json={"value": "yes"})
        assert missing.json()["error"]["code"] == "unknown_variable"
        assert (await api.http.put(f"{path}/step%2F1", json={"value": "yes"})).status_code == 204
        assert (await api.http.put(f"{path}/step%2F1", json={"value": "yes"})).status_code == 204
        changed = await api.http.put(f"{path}/step%2F1", json={"value": "no"})
        assert changed.json()["error"]["code"] == "invalid_program"
        assert (await api.post(f"/v1/programs/{program_id}/calls", {"close": True})).status_code == 200
        events = sse((await task).text)
    assert events[-1][2]["variables"] == {"judge.out": "agreed"}
    assert api.engine.prompts()[-1] == chat_prompt("a draft? yes")
    closed = await api.post(f"/v1/programs/{program_id}/calls", {"close": True})
    assert "has ended (completed) and cannot grow" in closed.json()["error"]["message"]


async def test_cancelling(api):
    api.engine.hold()
    async with streaming(api, CHAIN) as (program_id, task):
        await until(lambda: api.engine.active)
        state = (await api.http.delete(f"/v1/programs/{program_id}")).json()
        events = sse((await task).text)
    assert (state["status"], state["error"]["code"]) == ("failed", "cancelled")
    assert events[-1][1] == "program.failed"
    assert api.engine.active == []
    assert (await api.http.delete(f"/v1/programs/{program_id}")).json() == state


async def test_a_failed_program_answers_with_its_state(api):
    api.engine.hold()
    task = asyncio.create_task(api.post("/v1/programs", CHAIN))
    await until(lambda: api.engine.active)
    api.engine.fail("engine_failed", "the engine died")
    response = await task
    assert response.status_code == 200
    state = ProgramState.model_validate_json(response.content)
    assert state.error.code == "upstream_failed"
    assert "engine_failed: the engine died" in state.error.message


async def test_the_same_key_replays_from_the_first_event(api):
    body = CHAIN | {"stream": True, "idempotency_key": "once"}
    first, second = await asyncio.gather(api.post("/v1/programs", body), api.post("/v1/programs", body))
    third = await api.post("/v1/programs", body)
    assert first.text == second.text == third.text
    assert len(api.engine.requests) == 2
    other = await api.post("/v1/programs", body | {"detached": True})
    assert (other.status_code, other.json()["error"]["param"]) == (400, "idempotency_key")


async def test_prompts_of_text_completion(api):
    request = {
        "prompt": [{"type": "text", "text": "Draft"}, {"type": "variable", "variable": "v"}],
        "max_tokens": 20,
    }
    body = {
        "calls": [{"id": "a", "output": "x", "request": request}],
        "variables": {"v": {"value": " it"}},
        "targets": [{"variable": "x"}],
    }
    state = (await api.post("/v1/programs", body)).json()
    assert api.engine.prompts() == ["Draft it"]
    assert state["calls"][0]["completion"]["choices"][0]["text"] == "a draft"
    assert state["variables"] == {"x": "a draft"}


async def test_plain_requests_are_programs_while_they_run(api):
    api.engine.hold()
    hints = {"app": "crew", "group": "writers", "group_size": 4, "stage": 1}
    task = asyncio.create_task(api.chat(macaw=hints, user="u1"))
    await until(lambda: api.engine.active)
    (state,) = ProgramList.model_validate_json((await api.http.get("/v1/programs")).content).data
    assert state.metadata == {
        "app": "crew",
        "group": "writers",
        "group_size": "4",
        "stage": "1",
        "user": "u1",
    }
    assert [c.status for c in state.calls] == ["running"]
    assert api.engine.requests[0].hints.program_id == "anonymous/crew"
    api.engine.release()
    assert (await task).status_code == 200
    assert (await api.http.get("/v1/programs")).json() == {"object": "list", "data": []}
