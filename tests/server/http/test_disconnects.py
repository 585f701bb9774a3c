"""Clients that leave a real socket."""

import http.client
import json

import httpx
import pytest

from server.service.harness import call, until


@pytest.fixture
def held(live):
    live.engine.hold()
    return live


def post(live, path, body):
    """A request whose answer is not read."""
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"))
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    return connection


async def active(live, num):
    await until(lambda: len(live.engine.active) == num)


CHAT = {"messages": [{"role": "user", "content": "Count."}]}
PROGRAM = {"calls": [call("a", "Count.")], "targets": [{"variable": "a.out"}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/programs", PROGRAM)])
def test_a_client_that_leaves_frees_the_engine(held, path, body, stream):
    connection = post(held, path, body | {"stream": stream})
    held.run(active(held, 1))
    assert held.service.num_live_calls == 1
    connection.close()
    held.run(active(held, 0))
    assert held.engine.aborted == [held.engine.requests[0].request_id]
    assert held.service.num_live_calls == 0


def test_a_detached_program_goes_on_and_can_be_taken_up_again(held):
    with (
        httpx.Client(base_url=held.url) as client,
        client.stream("POST", "/v1/programs", json=PROGRAM | {"stream": True, "detached": True}) as response,
    ):
        lines = response.iter_lines()
        created = next(json.loads(line[6:]) for line in lines if line.startswith("data: "))
    held.run(active(held, 1))

    async def release():
        held.engine.release()

    held.run(release())
    with httpx.Client(base_url=held.url) as client:
        rest = client.get(f"/v1/programs/{created['program_id']}/events", params={"after": 0}).text
    events = [json.loads(line[6:]) for line in rest.splitlines() if line.startswith("data: ")]
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["variables"] == {"a.out": "one two three four"}
