"""Event streams of both clients: order, breaks, reconnects, closing, results."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from macaw import (
    AsyncMacawClient,
    CancelledError,
    ConnectionFailedError,
    NotFoundError,
    OverloadedError,
    ProgramBuilder,
    ServerError,
)
from macaw._stream import StreamState
from macaw._transport import Endpoint, get_events
from macaw.protocol import (
    CallDelta,
    ErrorBody,
    ProgramCompleted,
    ProgramCreated,
    ProgramFailed,
    Totals,
    VariableResolved,
)

EVENTS = [
    ProgramCreated(sequence=0, program_id="p1"),
    CallDelta(sequence=1, call_id="final", chunk={"choices": [{"delta": {"content": "Grüße\n\n"}}]}),
    CallDelta(sequence=2, call_id="final", chunk={"choices": [{"delta": {"content": "🦜"}}]}),
    VariableResolved(sequence=3, variable="final", value="Grüße\n\n🦜"),
    ProgramCompleted(
        sequence=4,
        program_id="p1",
        variables={"final": "Grüße\n\n🦜"},
        critical_path=["final"],
        totals=Totals(calls=1),
        duration_ms=3.0,
    ),
]
FAILED = ProgramFailed(
    sequence=1,
    program_id="p1",
    error=ErrorBody(message="cancelled by its client", type="call_error", code="cancelled"),
    variables={},
    totals=Totals(),
    duration_ms=1.0,
)
PROGRAMS, REST = "/v1/programs", "/v1/programs/p1/events"


def encode(event):
    return f": ping\r\nid: {event.sequence}\r\ndata: {event.model_dump_json()}\r\n\r\n".encode()


def a_program(**options):
    builder = ProgramBuilder("m")
    builder.target(builder.chat("Hello", max_tokens=4, name="final"))
    return builder.build(**options)


def test_events_come_typed_and_in_order(client, server):
    server.answer_events("POST", PROGRAMS, EVENTS)
    with client.stream_program(a_program()) as stream:
        assert list(stream) == EVENTS
    [seen] = server.seen
    assert seen.body["stream"] is True
    assert seen.headers["accept"] == "text/event-stream"


def test_program_id_is_known_before_the_first_event_is_taken(client, server):
    server.answer_events("POST", PROGRAMS, EVENTS)
    with client.stream_program(a_program()) as stream:
        assert stream.program_id == "p1"
        assert next(iter(stream)) == EVENTS[0]


def test_pings_come_to_nothing(client, server):
    server.answer_events("POST", PROGRAMS, [b": ping\r\n\r\n", EVENTS[0], b": ping\r\n\r\n", *EVENTS[1:], b": bye\n\n"])
    with client.stream_program(a_program()) as stream:
        assert list(stream) == EVENTS


def test_events_of_a_running_program_from_a_given_one_on(client, server):
    server.answer_events("GET", REST, EVENTS[3:])
    with client.events("p1", after=2) as stream:
        assert stream.program_id == "p1"
        assert list(stream) == EVENTS[3:]
    assert server.seen[0].query == {"after": "2"}


def test_all_events_of_a_running_program(client, server):
    server.answer_events("GET", REST, EVENTS)
    with client.events("p1") as stream:
        assert list(stream) == EVENTS
    assert server.seen[0].query == {"after": "-1"}


def test_result_is_the_targets_values(client, server):
    server.answer_events("POST", PROGRAMS, EVENTS)
    stream = client.stream_program(a_program())
    assert stream.result() == {"final": "Grüße\n\n🦜"}
    assert stream.result() == {"final": "Grüße\n\n🦜"}


def test_failed_program_is_an_event_and_raised_by_the_result(client, server):
    server.answer_events("POST", PROGRAMS, [EVENTS[0], FAILED])
    stream = client.stream_program(a_program())
    assert list(stream) == [EVENTS[0], FAILED]
    with pytest.raises(CancelledError, match="cancelled by its client"):
        stream.result()


def test_closed_stream_has_no_result(client, server):
    server.answer_events("POST", PROGRAMS, EVENTS[:1], then="hold")
    with client.stream_program(a_program()) as stream:
        pass
    assert list(stream) == []
    with pytest.raises(ConnectionFailedError, match=r"stream of program p1 at .* ended before the program did"):
        stream.result()


def test_closing_a_stream_closes_the_connection(client, server):
    server.answer_events("POST", PROGRAMS, EVENTS[:2], then="hold")
    with client.stream_program(a_program()) as stream:
        assert next(iter(stream)) == EVENTS[0]
    assert server.disconnected.wait(timeout=30)


async def test_cancelling_the_task_closes_the_connection(server):
    server.answer_events("POST", PROGRAMS, EVENTS[:1], then="hold")
    first = asyncio.Event()

    async def follow(client):
        async with await client.stream_program(a_program()) as stream:
            async for _ in stream:
                first.set()

    async with AsyncMacawClient(server.url) as client:
        task = asyncio.create_task(follow(client))
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.disconnected.wait, 30)


def test_connection_is_used_again_after_a_whole_stream(client, server):
    for _ in range(2):
        server.answer_events("POST", PROGRAMS, EVENTS)
        assert client.stream_program(a_program()).result()
    assert server.seen[0].client_port == server.seen[1].client_port


def test_break_after_the_last_event_does_no_harm(client, server):
    server.answer_events("POST", PROGRAMS, EVENTS, then="drop")
    assert list(client.stream_program(a_program())) == EVENTS


@pytest.mark.parametrize("then", ["drop", "end"])
def test_attached_programs_stream_does_not_survive_a_break(client, server, then):
    server.answer_events("POST", PROGRAMS, EVENTS[:3], then=then)
    stream = client.stream_program(a_program())
    assert [next(stream) for _ in range(3)] == EVENTS[:3]
    with pytest.raises(ConnectionFailedError), stream:
        next(stream)
    assert len(server.seen) == 1


@pytest.mark.parametrize("then", ["drop", "end"])
def test_detached_programs_stream_goes_on_where_it_broke(connect, server, then):
    """Twice, with one reconnect allowed in a row: an event in between starts the count anew."""
    cut_in_a_character = encode(EVENTS[2]).partition("🦜".encode())[0] + "🦜".encode()[:2]
    server.answer_events("POST", PROGRAMS, [*EVENTS[:2], cut_in_a_character], then=then)
    server.answer_events("GET", REST, EVENTS[2:3], then=then)
    server.answer_events("GET", REST, EVENTS[1:])  # events that were sent again are left out
    assert list(connect(max_reconnects=1).stream_program(a_program(detached=True))) == EVENTS
    assert [(seen.method, seen.query) for seen in server.seen] == [
        ("POST", {}),
        ("GET", {"after": "1"}),
        ("GET", {"after": "2"}),
    ]


def test_events_stream_goes_on_where_it_broke(client, server):
    server.answer_events("GET", REST, EVENTS[:2], then="drop")
    server.answer_events("GET", REST, EVENTS[2:])
    assert list(client.events("p1")) == EVENTS
    assert [seen.query for seen in server.seen] == [{"after": "-1"}, {"after": "1"}]


def test_break_before_the_first_event_posts_the_same_program_again(client, server):
    server.answer_events("POST", PROGRAMS, [b": ping\n\n"], then="drop")
    server.answer_events("POST", PROGRAMS, EVENTS)
    assert list(client.stream_program(a_program(detached=True))) == EVENTS
    assert len({seen.body["idempotency_key"] for seen in server.seen}) == 1


def test_reconnect_waits_for_a_server_that_comes_back(client, server):
    server.answer_events("POST", PROGRAMS, EVENTS[:2], then="drop")
    server.answer("GET", REST, "<html>Bad Gateway</html>", status=502)
    server.answer("GET", REST, {"error": OverloadedError("full").to_wire()}, status=429, retry_after="0")
    server.answer_events("GET", REST, EVENTS[2:])
    assert list(client.stream_program(a_program(detached=True))) == EVENTS


def test_reconnect_gives_up_after_so_many_tries_in_a_row(connect, server):
    server.answer_events("POST", PROGRAMS, EVENTS[:1], then="drop")
    for _ in range(3):
        server.answer_events("GET", REST, [], then="drop")
    stream = connect(max_reconnects=2).stream_program(a_program(detached=True))
    with pytest.raises(ConnectionFailedError), stream:
        list(stream)
    assert len(server.seen) == 3


def test_program_that_is_gone_is_not_asked_for_again(client, server):
    server.answer_events("POST", PROGRAMS, EVENTS[:1], then="drop")
    server.answer("GET", REST, {"error": NotFoundError("No program 'p1'.").to_wire()}, status=404)
    stream = client.stream_program(a_program(detached=True))
    with pytest.raises(NotFoundError, match="No program 'p1'"), stream:
        list(stream)
    assert len(server.seen) == 2


def test_lost_event_is_an_error(client, server):
    server.answer_events("POST", PROGRAMS, [EVENTS[0], EVENTS[2]], then="hold")
    stream = client.stream_program(a_program())
    with (
        pytest.raises(ServerError, match=r"Event 2 of program p1 .* came after event 0: the server lost some"),
        stream,
    ):
        list(stream)


@pytest.mark.parametrize("data", [b"[DONE]", b'{"type": "program.paused", "sequence": 1}', b'{"sequence": 1}'])
def test_unknown_event_is_an_error(client, server, data):
    server.answer_events("POST", PROGRAMS, [EVENTS[0], b"data: " + data + b"\n\n"], then="hold")
    stream = client.stream_program(a_program())
    with pytest.raises(ServerError, match=r"Cannot read event .* of program p1"), stream:
        list(stream)


def test_first_event_must_name_the_program(client, server):
    server.answer_events("POST", PROGRAMS, [EVENTS[1].model_copy(update={"sequence": 0})], then="hold")
    with pytest.raises(ServerError, match=r"with call\.delta, not program\.created"):
        client.stream_program(a_program())
    assert server.disconnected.wait(timeout=30)


BREAKS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 900)), max_size=6)


@given(BREAKS, st.integers(1, 400))
def test_no_event_is_lost_or_doubled_however_the_stream_breaks(breaks, chunk_size):
    """Breaks after any number of bytes, chunks of any size, and a server that sends some events again."""
    endpoint = Endpoint("http://x", {}, timeout_s=1.0, max_retries=0, max_reconnects=6, backoff_s=0.0)
    state = StreamState(endpoint, get_events("p1", after=-1), program_id="p1", resumable=True)
    got = []
    for num_repeated, num_bytes in [*breaks, (0, 10_000)]:
        body = b"".join(map(encode, EVENTS[max(0, len(got) - num_repeated) :]))[:num_bytes]
        for start in range(0, len(body), chunk_size):
            state.receive(body[start : start + chunk_size])
        got += state.ready
        state.ready.clear()
        if state.final is not None:
            break
        assert state.reconnect_wait_s(ConnectionFailedError("broke")) == 0.0
        assert state.next_operation() == get_events("p1", after=len(got) - 1)
    assert got == EVENTS
    assert state.result() == EVENTS[-1].variables
