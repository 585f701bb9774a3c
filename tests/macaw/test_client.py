"""Both clients against a scripted server: requests, answers, errors and retries."""

import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from macaw import (
    AsyncMacawClient,
    ConnectionFailedError,
    InvalidProgramError,
    MacawClient,
    NotFoundError,
    OverloadedError,
    ProgramBuilder,
    ServerError,
    UnauthorizedError,
    UpstreamFailedError,
)
from macaw._transport import Endpoint
from macaw.protocol import ProgramGrowth, ProgramRequest, ProgramState, Totals

STATE = ProgramState(
    id="p1",
    status="completed",
    model="m",
    calls=[],
    transforms=[],
    targets=[{"variable": "final"}],
    variables={"doc": "long", "final": "short"},
    critical_path=[],
    totals=Totals(),
    duration_ms=1.5,
    metadata={},
)
PATIENCE = {"timeout_s": 1.0, "max_retries": 0, "max_reconnects": 0, "backoff_s": 0.0}
OVERLOADED = {"error": {"message": "The queue is full.", "type": "rate_limit_error", "code": "overloaded"}}


def a_program(**options):
    builder = ProgramBuilder("m")
    builder.target(builder.chat("Hello", max_tokens=4, name="final"))
    return builder.build(**options)


def test_run_program_posts_it_and_returns_its_state(client, server):
    server.answer("POST", "/v1/programs", STATE.model_dump())
    request = a_program(stream=True, idempotency_key="k")
    assert client.run_program(request) == STATE
    [seen] = server.seen
    assert ProgramRequest.model_validate(seen.body) == request.model_copy(update={"stream": False})
    assert seen.headers["content-type"] == "application/json"


def test_state_gives_the_targets_values(client, server):
    server.answer("POST", "/v1/programs", STATE.model_dump())
    assert client.run_program(a_program()).result() == {"final": "short"}


def test_failed_program_is_raised_by_its_result_only(client, server):
    error = {
        "message": "call 'a' failed",
        "type": "call_error",
        "param": "calls[0]",
        "code": "upstream_failed",
    }
    server.answer("POST", "/v1/programs", {**STATE.model_dump(), "status": "failed", "error": error})
    state = client.run_program(a_program())
    with pytest.raises(UpstreamFailedError, match="call 'a' failed") as caught:
        state.result()
    assert caught.value.param == "calls[0]"


def test_get_program(client, server):
    server.answer("GET", "/v1/programs/p1", STATE.model_dump())
    assert client.get_program("p1") == STATE


def test_list_programs(client, server):
    server.answer("GET", "/v1/programs", {"object": "list", "data": [STATE.model_dump()]})
    assert client.list_programs() == [STATE]


def test_grow_posts_what_is_new(client, server):
    server.answer("POST", "/v1/programs/p1/calls", {})
    growth = ProgramGrowth(targets=[{"variable": "final"}], close=True)
    assert client.grow("p1", growth) is None
    assert ProgramGrowth.model_validate(server.seen[0].body) == growth


def test_set_variable_quotes_the_name(client, server):
    server.answer("PUT", "/v1/programs/p1/variables/docs/[0]", {})
    assert client.set_variable("p1", "docs/[0]", "text") is None
    assert server.seen[0].path == "/v1/programs/p1/variables/docs%2F%5B0%5D"
    assert server.seen[0].body == {"value": "text"}


def test_cancel_deletes(client, server):
    server.answer("DELETE", "/v1/programs/p1", {})
    assert client.cancel("p1") is None
    assert server.seen[0].method == "DELETE"


def test_models_are_names(client, server):
    server.answer("GET", "/v1/models", {"object": "list", "data": [{"id": "a", "object": "model"}, {"id": "b"}]})
    assert client.models() == ["a", "b"]


def test_health_is_what_the_server_says(client, server):
    server.answer("GET", "/health", {"status": "running"})
    assert client.health() == {"status": "running"}


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_base_url_with_or_without_v1(connect, server, suffix):
    server.answer("GET", "/v1/models", {"data": []})
    assert connect(server.url + suffix).models() == []


def test_server_and_key_come_from_the_environment(connect, server, monkeypatch):
    monkeypatch.setenv("MACAW_BASE_URL", server.url)
    monkeypatch.setenv("MACAW_API_KEY", "secret")
    server.answer("GET", "/v1/models", {"data": []})
    connect(None).models()
    assert server.seen[0].headers["authorization"] == "Bearer secret"


def test_arguments_win_over_the_environment(connect, server, monkeypatch):
    monkeypatch.setenv("MACAW_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("MACAW_API_KEY", "other")
    server.answer("GET", "/v1/models", {"data": []})
    connect(server.url, api_key="mine").models()
    assert server.seen[0].headers["authorization"] == "Bearer mine"


def test_without_a_key_none_is_sent(connect, server, monkeypatch):
    monkeypatch.delenv("MACAW_API_KEY", raising=False)
    server.answer("GET", "/v1/models", {"data": []})
    connect().models()
    assert "authorization" not in server.seen[0].headers


def test_key_is_not_in_the_repr():
    with MacawClient(api_key="secret") as client:
        assert "secret" not in repr(client._endpoint)


@pytest.mark.parametrize("make", [MacawClient, AsyncMacawClient])
def test_base_url_without_a_scheme_is_refused(make):
    with pytest.raises(ValueError, match=r"'localhost:8000' has no scheme\. Give a URL such as 'http://"):
        make("localhost:8000")


def test_error_object_becomes_its_exception(client, server):
    error = InvalidProgramError("Variable 'x' has no producer.", code="unknown_variable", param="calls[0]")
    server.answer("POST", "/v1/programs", {"error": error.to_wire()}, status=400)
    with pytest.raises(InvalidProgramError, match="Variable 'x' has no producer") as caught:
        client.run_program(a_program())
    assert (caught.value.code, caught.value.param, caught.value.status) == (
        "unknown_variable",
        "calls[0]",
        400,
    )


def test_page_of_a_proxy_is_named_as_such(client, server):
    server.answer("GET", "/v1/programs/p1", "<html>Bad Gateway</html>", status=502)
    with pytest.raises(ServerError, match=r"answered 502 Bad Gateway with text/html.*<html>Bad Gateway") as caught:
        client.get_program("p1")
    assert caught.value.status == 502


@pytest.mark.parametrize("body", [{"detail": "Not Found"}, {"error": "Not Found"}, ["no"], {"error": None}])
def test_foreign_error_body_is_shown(client, server, body):
    server.answer("GET", "/v1/programs/p1", body, status=404)
    with pytest.raises(NotFoundError, match="answered 404 Not Found with application/json"):
        client.get_program("p1")


def test_page_of_a_login_wall_is_unauthorized(client, server):
    server.answer("GET", "/v1/models", "<html>Sign in</html>", status=401)
    with pytest.raises(UnauthorizedError, match="Sign in"):
        client.models()


@pytest.mark.parametrize("body", ["<html>Welcome</html>", {"data": [{}]}, {"data": None}, []])
def test_good_status_with_a_foreign_body_is_a_server_error(client, server, body):
    server.answer("GET", "/v1/models", body)
    with pytest.raises(ServerError, match="answered 200, but not as a Macaw server does"):
        client.models()


def test_stream_that_is_none_is_a_server_error(client, server):
    server.answer("POST", "/v1/programs", "<html>Welcome</html>")
    with pytest.raises(ServerError, match="answered 200 OK with text/html"):
        client.stream_program(a_program())


def test_no_server_says_how_to_start_one(connect):
    with socket.socket() as bound_but_not_listening:
        bound_but_not_listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound_but_not_listening.getsockname()[1]}"
        with pytest.raises(ConnectionFailedError, match=f"No Macaw server at {url}.*macaw serve MODEL --port N"):
            connect(url).run_program(a_program())


def test_timeout_is_named_with_its_number(connect, server):
    server.answer_never("GET", "/v1/programs/p1")
    with pytest.raises(ConnectionFailedError, match=r"sent nothing for 0\.05 s \(ReadTimeout\)"):
        connect(timeout_s=0.05).get_program("p1")


def test_broken_answer_is_a_connection_error(client, server):
    server.answer_events("GET", "/v1/programs/p1", [b"{"], then="drop")
    with pytest.raises(ConnectionFailedError, match=f"The connection to {server.url} broke"):
        client.get_program("p1")


@pytest.mark.parametrize("key", [None, "mine"])
def test_overloaded_server_gets_the_same_program_again(client, server, key):
    server.answer("POST", "/v1/programs", OVERLOADED, status=429, retry_after="0")
    server.answer("POST", "/v1/programs", OVERLOADED, status=429)
    server.answer("POST", "/v1/programs", STATE.model_dump())
    assert client.run_program(a_program(idempotency_key=key)) == STATE
    keys = {seen.body["idempotency_key"] for seen in server.seen}
    assert len(server.seen) == 3
    assert len(keys) == 1
    assert key in (None, *keys)


def test_two_runs_of_a_program_have_two_keys(client, server):
    for _ in range(2):
        server.answer("POST", "/v1/programs", STATE.model_dump())
        client.run_program(a_program())
    assert server.seen[0].body["idempotency_key"] != server.seen[1].body["idempotency_key"]


def test_overload_is_raised_when_the_retries_are_used_up(connect, server):
    for _ in range(3):
        server.answer("POST", "/v1/programs", OVERLOADED, status=429, retry_after="0")
    with pytest.raises(OverloadedError, match="The queue is full") as caught:
        connect(max_retries=1).run_program(a_program())
    assert caught.value.retry_after_s == 0.0
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("header", "retry_after_s"),
    [
        ("601", 601.0),
        ("Mon, 01 Jan 2024 00:00:00 GMT", 0.0),
        ("Mon, 01 Jan 2024 00:00:00", None),
        ("soon", None),
    ],
)
def test_retry_after_is_on_the_error(connect, server, header, retry_after_s):
    server.answer("GET", "/v1/models", OVERLOADED, status=429, retry_after=header)
    with pytest.raises(OverloadedError) as caught:
        connect().models()
    assert caught.value.retry_after_s == retry_after_s


def test_wait_longer_than_the_timeout_is_not_waited_out(connect, server):
    server.answer("POST", "/v1/programs", OVERLOADED, status=429, retry_after="601")
    with pytest.raises(OverloadedError):
        connect(timeout_s=600.0).run_program(a_program())
    assert len(server.seen) == 1


def test_only_posts_of_programs_are_sent_again(client, server):
    server.answer("POST", "/v1/programs/p1/calls", OVERLOADED, status=429, retry_after="0")
    with pytest.raises(OverloadedError):
        client.grow("p1", ProgramGrowth(close=True))
    assert len(server.seen) == 1


def test_http_client_that_was_passed_in_stays_open(server):
    server.answer("GET", "/v1/models", {"data": []})
    with httpx.Client(headers={"x-mine": "yes"}) as http_client:
        with MacawClient(server.url, http_client=http_client) as client:
            client.models()
        assert not http_client.is_closed
    assert server.seen[0].headers["x-mine"] == "yes"


async def test_async_http_client_that_was_passed_in_stays_open(server):
    server.answer("GET", "/v1/models", {"data": []})
    async with httpx.AsyncClient(headers={"x-mine": "yes"}) as http_client:
        async with AsyncMacawClient(server.url, http_client=http_client) as client:
            await client.models()
        assert not http_client.is_closed
    assert server.seen[0].headers["x-mine"] == "yes"


def test_own_http_client_is_closed():
    with MacawClient() as client:
        pass
    assert client._http.is_closed


def test_threads_may_share_a_client(server):
    for _ in range(16):
        server.answer("GET", "/v1/programs/p1", STATE.model_dump())
    with MacawClient(server.url) as client, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(client.get_program, ["p1"] * 16)) == [STATE] * 16


def test_plain_http_loads_no_certificates_and_trusts_nobody():
    assert "verify" not in Endpoint.resolve("https://example.test", None, **PATIENCE).http_options()
    context = Endpoint.resolve("http://example.test", None, **PATIENCE).http_options()["verify"]
    assert context.cert_store_stats()["x509_ca"] == 0
    assert context.verify_mode is ssl.CERT_REQUIRED
