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
        grown = await api.post(f"/v1/programs/{program_id}/calls", growth)
        assert (grown.status_code, grown.content) == (204, b"")
        state = await api.http.get(f"/v1/programs/{program_id}")
        assert [c["id"] for c in state.json()["calls"]] == ["draft", "judge"]
        path = f"/v1/programs/{program_id}/variables"
        missing = await api.http.put(f"{path}/nope", json={"value": "yes"})
        assert missing.json()["error"]["code"] == "unknown_variable"
        assert (await api.http.put(f"{path}/step%2F1", json={"value": "yes"})).status_code == 204
        assert (await api.http.put(f"{path}/step%2F1", json={"value": "yes"})).status_code == 204
        changed = await api.http.put(f"{path}/step%2F1", json={"value": "no"})
        assert changed.json()["error"]["code"] == "invalid_program"
        assert (await api.post(f"/v1/programs/{program_id}/calls", {"close": True})).status_code == 204
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
    task = asyncio.create_task(api.chat(macaw={"group": "writers", "group_size": 4, "stage": 1}, user="u1"))
    await until(lambda: api.engine.active)
    (state,) = await programs(api)
    assert state.metadata == {"group": "writers", "group_size": "4", "stage": "1", "user": "u1"}
    assert [c.status for c in state.calls] == ["running"]
    api.engine.release()
    answer = await task
    assert answer.json()["macaw"]["program_id"] == state.id
    assert await programs(api) == []


async def test_requests_of_one_app_are_one_program_with_groups(api):
    plan = (await api.chat("Plan it", macaw={"app": "crew", "stage": 0})).json()
    api.engine.hold()
    hints = {"app": "crew", "group": "writers", "group_size": 2, "stage": 1}
    tasks = [asyncio.create_task(api.chat(f"Write {i}", macaw=hints)) for i in range(2)]
    await until(lambda: len(api.engine.active) == 2)
    assert {request.hints.program_id for request in api.engine.requests} == {"anonymous/crew"}
    (state,) = await programs(api)
    assert (state.status, state.metadata, state.totals.calls) == ("running", {"app": "crew"}, 3)
    assert [(c.id, c.status, c.depth, c.group, c.group_size) for c in state.calls] == [
        ("0", "completed", 0, None, None),
        ("1", "running", 1, "writers", 2),
        ("2", "running", 1, "writers", 2),
    ]
    assert all(call.completion is None for call in state.calls)
    assert state.calls[0].timings.completed_ms <= state.calls[1].timings.ready_ms
    api.engine.release()
    answers = [(await task).json() for task in tasks]
    assert {answer["macaw"]["program_id"] for answer in answers} == {state.id}
    (ended,) = await programs(api)
    assert (ended.id, ended.status) == (state.id, "completed")
    usage = [answer["usage"] for answer in (plan, *answers)]
    for name in ("prompt_tokens", "completion_tokens"):
        assert getattr(ended.totals, name) == sum(one[name] for one in usage)
    one = await api.http.get(f"/v1/programs/{state.id}")
    assert ProgramState.model_validate_json(one.content) == ended


async def test_an_app_is_cancelled_as_a_whole(api):
    api.engine.hold()
    tasks = [asyncio.create_task(api.chat(f"Write {i}", macaw={"app": "crew"})) for i in range(2)]
    await until(lambda: len(api.engine.active) == 2)
    (state,) = await programs(api)
    cancelled = await api.http.delete(f"/v1/programs/{state.id}")
    assert [call["error"]["code"] for call in cancelled.json()["calls"]] == ["cancelled"] * 2
    assert [(await task).status_code for task in tasks] == [499, 499]
    assert not api.engine.active


async def test_apps_are_a_tenants_own_and_bounded(make_api):
    api = make_api(api_keys=("a", "b"), max_kept_programs=2, max_app_calls=3)

    async def ask(app, key):
        answer = await api.chat(macaw={"app": app}, headers={"Authorization": f"Bearer {key}"})
        return answer.json()["macaw"]["program_id"]

    async def of(key):
        return [(state.metadata["app"], len(state.calls)) for state in await programs(api, key)]

    first = await ask("x", "a")
    assert await ask("x", "a") == first
    assert await ask("x", "b") != first
    headers = {"Authorization": "Bearer b"}
    assert (await api.http.get(f"/v1/programs/{first}", headers=headers)).status_code == 404
    for app in "yz":
        await ask(app, "a")
    assert await of("a") == [("y", 1), ("z", 1)]
    assert await of("b") == [("x", 1)]
    for _ in range(4):
        await ask("z", "a")
    (state,) = await programs(api, "a")
    assert (state.totals.calls, [call.id for call in state.calls]) == (5, ["2", "3", "4"])


async def programs(api, key=None):
    """What the server lists."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return ProgramList.model_validate_json((await api.http.get("/v1/programs", headers=headers)).content).data
