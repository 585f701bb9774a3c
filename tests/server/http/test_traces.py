"""`GET /v1/trace`: what is told of calls, and to whom."""

import asyncio

import pytest

from macaw.protocol import TracedCall, TraceLost, TraceStarted
from macaw.protocol.traces import TRACE_EVENT
from macaw_server.service import traces
from server.http.conftest import sse
from server.service.harness import ScriptedEngine, call, encode, until

LONG = "A text that is a good deal longer than sixteen tokens, so that it fills some blocks."


def bearer(key):
    return {"authorization": f"Bearer {key}"}


class Recording:
    """Reads ``/v1/trace`` while the block runs; then `events` are there."""

    def __init__(self, api, key=None, **params):
        self._api, self._headers, self._params = api, bearer(key) if key else {}, params
        self._tenant = api.service.tenants.authenticate(self._headers.get("authorization"))

    async def __aenter__(self):
        before = len(self._api.service.traces.of(self._tenant))
        get = self._api.http.get("/v1/trace", headers=self._headers, params=self._params)
        self._task = asyncio.create_task(get)
        await until(lambda: len(self._api.service.traces.of(self._tenant)) > before)
        [*_, self.recording] = self._api.service.traces.of(self._tenant)
        return self

    async def __aexit__(self, *exc_info):
        self.recording.close()
        response = await self._task
        assert response.headers["content-type"].startswith("text/event-stream")
        self.events = [
            TRACE_EVENT.validate_json(line[6:]) for line in response.text.splitlines() if line[:5] == "data:"
        ]
        assert [event.type for event in self.events] == [name for _, name, _ in sse(response.text)]
        assert self.recording not in self._api.service.traces.of(self._tenant)

    @property
    def calls(self):
        return {event.node: event for event in self.events if isinstance(event, TracedCall)}


def same(first, second):
    """How many numbers two calls have in common, from the front."""
    pairs = zip(first.blocks, second.blocks, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first.blocks), len(second.blocks)))


async def test_a_program(api):
    targets = [{"variable": "b.out", "objective": "throughput", "deadline_ms": 60_000}]
    calls = [call("b", LONG, "$text"), call("a", LONG, max_tokens=9)]
    transforms = [{"id": "t", "op": "strip", "inputs": ["a.out"], "output": "text"}]
    program = {"calls": calls, "transforms": transforms, "targets": targets, "metadata": {"chain": "Refine"}}
    async with Recording(api) as recording:
        state = (await api.post("/v1/programs", program)).json()
    started, first, second = recording.events
    assert isinstance(started, TraceStarted)
    assert (first.node, first.deps, second.node, second.deps) == ("a", [], "b", ["a"])
    usage = {c["id"]: c["completion"]["usage"] for c in state["calls"]}
    for event in (first, second):
        assert (event.program, event.kind, event.app) == (state["id"], "program", "Refine")
        assert (event.objective, event.deadline_ms) == ("throughput", 60_000)
        assert event.prompt_tokens == usage[event.node]["prompt_tokens"]
        assert event.cached_tokens == usage[event.node]["prompt_tokens_details"]["cached_tokens"]
        assert event.output_tokens == [usage[event.node]["completion_tokens"]]
        assert len(event.blocks) == -(-event.prompt_tokens // 16)
        assert len(event.answer) == (event.prompt_tokens + event.output_tokens[0]) // 16 - event.prompt_tokens // 16
    assert same(first, second) == len(encode(f"<|role|>user\n{LONG}")) // 16
    assert started.now_ms <= first.arrival_ms == first.ready_ms < first.ended_ms == second.ready_ms < second.ended_ms


async def test_numbers_are_of_one_recording_and_of_no_text(api):
    async with Recording(api) as first, Recording(api) as second:
        await api.chat(LONG)
        await api.chat(LONG)
    one, other = first.calls.values()
    assert one.blocks == other.blocks
    assert len(set(one.blocks)) == len(one.blocks)  # the same words again would have another number
    [again, _] = second.calls.values()
    assert not {*one.blocks, *one.answer} & {*again.blocks, *again.answer}


async def test_the_next_prompt_of_a_conversation_has_the_answers_blocks(api):
    api.engine.script = {"Begin": LONG}
    messages = [{"role": "user", "content": "Begin"}]
    async with Recording(api) as recording:
        answer = (await api.post("/v1/chat/completions", {"messages": messages, "max_tokens": 60})).json()
        messages += [{"role": "assistant", "content": LONG}, {"role": "user", "content": "Go on"}]
        assert answer["choices"][0]["message"]["content"] == LONG
        await api.post("/v1/chat/completions", {"messages": messages, "max_tokens": 5})
    first, second = recording.calls.values()
    at = first.prompt_tokens // 16
    assert first.answer
    assert second.blocks[at : at + len(first.answer)] == first.answer


async def test_requests_and_applications(api):
    hints = {"app": "run-17", "objective": "throughput"}
    async with Recording(api, block_size=32) as recording:
        await api.chat("Alone", n=3)
        shown = (await api.chat("One of many", macaw=hints)).json()["macaw"]["program_id"]
        await api.chat("Another", macaw=hints)
        await api.post("/v1/completions", {"prompt": [LONG, "x"], "max_tokens": 3})
    alone, one, other, *prompts = recording.events[1:]
    assert recording.events[0].block_size == 32
    assert (alone.kind, len(alone.output_tokens), alone.objective) == ("request", 3, "latency")
    for event in (one, other):
        assert (event.kind, event.program, event.app, event.objective) == ("application", shown, "run-17", "throughput")
    assert one.node != other.node
    assert {event.program for event in prompts} == {prompts[0].program}
    assert len({event.node for event in prompts}) == 2
    assert max(len(event.blocks) for event in prompts) == -(-len(encode(LONG)) // 32)


async def test_growth_comes_after_what_it_waited_for(live):
    from macaw import MacawClient, ProgramBuilder

    builder = ProgramBuilder()
    first = builder.chat("Count", name="first", max_tokens=5)
    with MacawClient(live.url) as client:
        recording = live.service.traces.begin(live.service.tenants.authenticate(None), 16)
        with client.stream_program(builder.build(open=True)) as stream:
            next(event for event in stream if event.type == "call.completed")
            builder.target(builder.chat("Go on", first, name="second", max_tokens=5))
            client.grow(stream.program_id, builder.growth(close=True))
            stream.result()
    recording.close()
    _, one, two = [event async for event in recording.events()]
    assert two.deps == ["first"]
    assert two.arrival_ms == one.arrival_ms < one.ended_ms < two.ready_ms


async def test_what_is_cut_off_counts_as_far_as_it_came(make_api):
    api = make_api(ScriptedEngine(held=True))
    program = {"calls": [call("a", "Hi"), call("b", "$a.out"), call("c", "Ho")], "targets": [{"variable": "b.out"}]}
    program["targets"].append({"variable": "c.out"})
    async with Recording(api) as recording:
        task = asyncio.create_task(api.post("/v1/programs", program))
        await until(lambda: len(api.engine.active) == 2)
        api.engine.step()
        api.engine.step()
        api.engine.fail("engine_failed", "gone", [api.engine.active[0]])
        [state] = (await api.http.get("/v1/programs")).json()["data"]
        await api.http.delete(f"/v1/programs/{state['id']}")
        await task
    assert {node: (event.error, event.output_tokens) for node, event in recording.calls.items()} == {
        "a": ("engine_failed", [2]),
        "c": ("cancelled", [2]),
    }


async def test_a_call_that_began_before_is_not_known(make_api):
    api = make_api(ScriptedEngine(held=True))
    task = asyncio.create_task(api.chat("Early", max_tokens=3))
    await until(lambda: api.engine.active)
    api.engine.step()
    async with Recording(api) as recording:
        api.engine.release()
        await task
        await api.chat("Late", max_tokens=3)
    [event] = recording.calls.values()
    assert event.prompt_tokens == len(api.engine.requests[1].prompt_ids)


async def test_a_tenant_has_its_own_calls_only(make_api):
    api = make_api(api_keys=("alice", "bob"))
    async with Recording(api, "alice") as of_alice, Recording(api, "bob") as of_bob:
        await api.chat(LONG, headers=bearer("alice"))
    assert len(of_alice.calls) == 1
    assert not of_bob.calls
    assert of_alice.events[0].tenant != of_bob.events[0].tenant
    assert (await api.http.get("/v1/trace")).status_code == 401


async def test_a_slow_reader_is_told_what_it_lost(api, monkeypatch):
    monkeypatch.setattr(traces, "MAX_KEPT", 2 * traces._CALL_COST + 20)
    tenant = api.service.tenants.authenticate(None)
    recording = api.service.traces.begin(tenant, 16)
    for _ in range(5):
        await api.chat("Hi", max_tokens=3)
    recording.close()
    events = [event async for event in recording.events()]
    assert [type(event) for event in events] == [TraceStarted, TracedCall, TracedCall, TraceLost]
    assert events[-1].num_calls == 3


async def test_recordings_are_few_and_end_with_the_server(api):
    tenant = api.service.tenants.authenticate(None)
    for _ in range(traces.MAX_RECORDINGS):
        api.service.traces.begin(tenant, 16)
    response = await api.http.get("/v1/trace")
    assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
    recordings = api.service.traces.of(tenant)
    await api.service.drain(0)
    for recording in recordings:
        assert [event.type async for event in recording.events()] == ["trace.started"]
        api.service.traces.end(recording)
    assert not api.service.traces.of(tenant)
    assert (await api.http.get("/v1/trace")).status_code == 503


@pytest.mark.parametrize("value", ["15", "65537", "many", "-16", "\u0662\u0660"])
async def test_block_sizes(api, value):
    response = await api.http.get("/v1/trace", params={"block_size": value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "block_size")
    assert "give 16 to 65,536 tokens" in response.json()["error"]["message"]
