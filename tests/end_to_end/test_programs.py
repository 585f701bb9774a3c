"""Programs against a real server: answers, events, growth, bad input beside a running program."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from conftest import TENANTS
from macaw import MacawClient, MacawError, ProgramBuilder
from macaw.protocol import CallCompleted, CallDelta, CallStarted, ProgramCompleted, ProgramRequest
from macaw_server.serve import LocalServer, bind

GREEDY = {"temperature": 0, "max_tokens": 16}


def map_reduce(num_maps: int = 4, max_tokens: int = 16) -> ProgramRequest:
    b = ProgramBuilder()
    maps = [
        b.chat(f"Summarise part {i}.", system="You summarise. " * 10, temperature=0, max_tokens=max_tokens)
        for i in range(num_maps)
    ]
    b.target(b.chat("Combine:\n", b.join(maps, separator="\n- "), name="reduce", **GREEDY))
    return b.build()


def ask(client: MacawClient, *prompt: str, system: str | None = None, max_tokens: int = 16) -> str:
    """One call as a program of its own."""
    b = ProgramBuilder()
    b.target(b.chat(*prompt, system=system, name="answer", temperature=0, max_tokens=max_tokens))
    return client.run_program(b.build()).variables["answer"]


def test_a_program_answers_as_its_calls_one_by_one(client: MacawClient) -> None:
    state = client.run_program(map_reduce())
    assert state.status == "completed"
    maps = [ask(client, f"Summarise part {i}.", system="You summarise. " * 10) for i in range(4)]
    assert state.variables["reduce"] == ask(client, "Combine:\n" + "\n- ".join(maps))
    assert state.critical_path[-1] == "reduce"
    assert state.totals.calls == 5
    assert {call.group for call in state.calls} == {"reduce", None}


def test_the_stream_tells_everything_in_order(client: MacawClient) -> None:
    with client.stream_program(map_reduce()) as stream:
        events = list(stream)
    assert [event.sequence for event in events] == list(range(len(events)))
    assert isinstance(events[-1], ProgramCompleted)
    for call in ("chat-0", "reduce"):
        kinds = [type(e) for e in events if getattr(e, "call_id", None) == call]
        assert kinds[0] is CallStarted
        assert kinds[-1] is CallCompleted
        assert set(kinds[1:-1]) == {CallDelta}
        deltas = [e.chunk for e in events if isinstance(e, CallDelta) and e.call_id == call]
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in deltas if c["choices"])
        done = next(e for e in events if isinstance(e, CallCompleted) and e.call_id == call)
        assert text == done.completion["choices"][0]["message"]["content"]
        assert done.completion["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0


def test_a_program_grows_and_waits_for_its_client(client: MacawClient) -> None:
    b = ProgramBuilder()
    question = b.external("question")
    first = b.chat("Answer: ", question, name="first", **GREEDY)
    b.target(first)
    stream = client.stream_program(b.build(open=True, detached=True))
    program_id = stream.program_id
    client.set_variable(program_id, "question", "why?")
    b.target(b.chat("Doubt: ", first, name="second", **GREEDY))
    client.grow(program_id, b.growth(close=True))
    answers = stream.result()
    assert answers["first"] == ask(client, "Answer: why?")
    assert answers["second"] == ask(client, f"Doubt: {answers['first']}")
    assert next(iter(client.events(program_id, after=2))).sequence == 3, "and can be read again"


def program(**fields: Any) -> dict[str, Any]:
    call = {"id": "a", "output": "x", "request": {"messages": [{"role": "user", "content": "hi"}]}}
    return {"calls": [call], "targets": [{"variable": "x"}], **fields}


def with_request(**fields: Any) -> dict[str, Any]:
    body = program()
    body["calls"][0]["request"] |= fields
    return body


def using(variable: str, call_id: str = "a", output: str = "x") -> dict[str, Any]:
    part = {"type": "variable", "variable": variable}
    return {"id": call_id, "output": output, "request": {"messages": [{"role": "user", "content": [part]}]}}


V = {"v": {"value": "."}}
LONG = {"messages": [{"role": "user", "content": "x " * 4000}]}
HUGE = b'{"messages": [{"role": "user", "content": "' + b"x" * (33 << 20) + b'"}]}'
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BAD_INPUT: list[tuple[str, Any, int, str, str]] = [
    ("/v1/programs", b'{"calls": [', 400, "invalid_request", "JSON"),
    ("/v1/chat/completions", b"not json", 400, "invalid_request", "JSON"),
    ("/v1/programs", program(colour="red"), 400, "invalid_program", "colour"),
    ("/v1/programs", with_request(colour="red"), 400, "invalid_program", "colour"),
    ("/v1/chat/completions", {**CHAT, "colour": "red"}, 400, "invalid_request", "colour"),
    ("/v1/programs", program(calls=[using("nowhere")]), 400, "unknown_variable", "nowhere"),
    ("/v1/programs", program(targets=[{"variable": "y"}]), 400, "unknown_variable", "y"),
    ("/v1/programs", program(calls=[using("v"), using("v", "b")], variables=V), 400, "invalid_program", "already"),
    ("/v1/programs", program(calls=[using("y"), using("x", "b", "y")]), 400, "cycle", "->"),
    ("/v1/completions", {"prompt": ""}, 400, "invalid_request", "empty"),
    ("/v1/chat/completions", {"messages": []}, 400, "invalid_request", "messages"),
    ("/v1/chat/completions", LONG, 400, "context_length_exceeded", "2,048"),
    ("/v1/programs", with_request(max_tokens=5000), 400, "context_length_exceeded", "5,000"),
    ("/v1/chat/completions", {**CHAT, "model": "gpt-4"}, 404, "unknown_model", "macaw-demo"),
    ("/v1/programs", program(model="gpt-4"), 404, "unknown_model", "macaw-demo"),
    ("/v1/chat/completions", {**CHAT, "functions": [{"name": "f"}]}, 400, "unsupported_parameter", "functions"),
    ("/v1/chat/completions", {**CHAT, "temperature": "hot"}, 400, "invalid_request", "temperature"),
    ("/v1/chat/completions", {**CHAT, "n": 2.5}, 400, "invalid_request", "n"),
    ("/v1/chat/completions", {**CHAT, "logit_bias": {"99999": 1}}, 400, "invalid_request", "99999"),
    ("/v1/chat/completions", {**CHAT, "stop_token_ids": [99999]}, 400, "invalid_request", "99999"),
    ("/v1/completions", {"prompt": [99999]}, 400, "invalid_request", "99999"),
    ("/v1/chat/completions", HUGE, 413, "request_too_large", "33,554,432"),
    ("/v1/nothing", {}, 404, "not_found", "/v1/nothing"),
]  # fmt: skip


def test_bad_input_is_refused_and_disturbs_nobody(local_server: LocalServer, client: MacawClient) -> None:
    quiet = client.run_program(map_reduce(max_tokens=200))
    headers = {"Authorization": f"Bearer {TENANTS[0]}", "Content-Type": "application/json"}
    with (
        client.stream_program(map_reduce(max_tokens=200)) as stream,
        httpx.Client(base_url=local_server.url, headers=headers, timeout=60) as http,
    ):
        assert stream.program_id
        for path, body, status, code, words in BAD_INPUT:
            answer = http.post(path, **({"content": body} if isinstance(body, bytes) else {"json": body}))
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (status, code), (path, error)
            assert words in error["message"]
            assert error["type"], error
        _gone_in_mid_stream(local_server)
        assert stream.result()["reduce"] == quiet.variables["reduce"]


def _gone_in_mid_stream(server: LocalServer) -> None:
    """A client that asks for a long stream, reads a little, and closes its socket."""
    with MacawClient(server.url, TENANTS[1]) as other:
        b = ProgramBuilder()
        b.target(b.chat("Go on for ever", name="long", temperature=0, max_tokens=1500, ignore_eos=True))
        stream = other.stream_program(b.build())
        program_id = stream.program_id
        stream.close()
        while (state := other.get_program(program_id)).status == "running":
            pass
        assert state.error is not None
        assert state.error.code == "cancelled"


def test_a_failed_call_names_the_root_and_other_branches_go_on(client: MacawClient) -> None:
    b = ProgramBuilder()
    long = b.external("long")
    bad = b.chat(long, name="bad", **GREEDY)
    b.target(b.chat("From bad: ", bad, name="after", **GREEDY))
    b.target(b.chat("On its own", name="good", **GREEDY))
    stream = client.stream_program(b.build())
    client.set_variable(stream.program_id, "long", "x " * 4000)
    with pytest.raises(MacawError, match=r"bad.*context_length_exceeded") as error:
        stream.result()
    assert error.value.code == "upstream_failed"
    state = client.get_program(stream.program_id)
    assert state.variables["good"] == ask(client, "On its own")
    assert {call.id: call.status for call in state.calls} == {
        "bad": "failed",
        "after": "failed",
        "good": "completed",
    }


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """asyncio turns Nagle's algorithm off for sockets that say their protocol, and accepted ones say the listener's."""
    with bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_port_in_use_is_said(local_server: LocalServer) -> None:
    from macaw_server.errors import PortInUseError
    from macaw_server.serve import bind

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortInUseError, match="is in use"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_sampling_hints_and_metadata_show_up(client: MacawClient, local_server: LocalServer) -> None:
    b = ProgramBuilder()
    b.target(b.chat("hello", name="a", **GREEDY), objective="throughput")
    state = client.run_program(b.build(metadata={"run": "7"}))
    assert state.metadata["run"] == "7"
    assert state.targets[0].objective == "throughput"


@pytest.mark.parametrize("action", ["cancel", "deadline"])
def test_cancel_and_deadline_free_everything(
    client: MacawClient, action: str, pages_in_use: Callable[[], float]
) -> None:
    b = ProgramBuilder()
    deadline = {"deadline_ms": 500} if action == "deadline" else {}
    b.target(b.chat("Go on", name="long", temperature=0, max_tokens=1900, ignore_eos=True), **deadline)
    with client.stream_program(b.build()) as stream:
        if action == "cancel":
            assert any(isinstance(event, CallDelta) for event in stream)
            client.cancel(stream.program_id)
        with pytest.raises(MacawError) as error:
            stream.result()
    assert error.value.code == ("cancelled" if action == "cancel" else "deadline_exceeded")
    assert ask(client, "next"), "the engine goes on"
    assert pages_in_use() == 0
