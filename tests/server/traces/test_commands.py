"""`macaw trace record` and `replay` as commands: what they say, and what they refuse."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from typer.testing import CliRunner

from macaw_server.cli import app
from macaw_server.service.types import NamedTenant
from macaw_server.traces.record import RecordError, RecordOptions, record
from macaw_server.workloads import read_trace
from server.http.conftest import LiveServer
from server.service.harness import ScriptedEngine

TENANTS = (NamedTenant("alice", ("alice-old", "alice-new")), NamedTenant("bob", ("bob-key",)))
TOML = '[alice]\nkeys = ["alice-old", "alice-new"]\n[bob]\nkeys = ["bob-key"]\n'


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with LiveServer(ScriptedEngine(), tenants=TENANTS) as live:
        yield live


@pytest.fixture
def stranger() -> Iterator[str]:
    """A server that is no Macaw's: a page at /page, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path.startswith("/page")
            self.send_response(200 if found else 404)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def macaw(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["trace", *map(str, words)])
    return result.exit_code, " ".join(result.output.split())


async def ask(url: str, *keys: str) -> None:
    async with httpx.AsyncClient() as http:
        for key in keys:
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
            headers = {"authorization": f"Bearer {key}"}
            assert (await http.post(f"{url}/v1/chat/completions", json=body, headers=headers)).is_success


def test_several_tenants_are_one_trace(server: LiveServer, tmp_path: Path) -> None:
    out = tmp_path / "trace"
    options = RecordOptions(server.url, ["alice-new", "bob-key"], out)
    told: list[str] = []

    async def stop() -> None:
        assert told == [server.url]
        await ask(server.url, "alice-old", "bob-key", "alice-new")

    totals = asyncio.run(record(options, stop, told.append))
    assert (totals.num_programs, totals.num_calls, totals.output_tokens) == (3, 3, 15)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["tenant"] for line in lines] == ["t0", "t1", "t0"]
    assert lines[0]["hash_ids"] == lines[2]["hash_ids"] != lines[1]["hash_ids"]
    assert lines[0]["timestamp"] == 0
    assert list(tmp_path.iterdir()) == [out]


def test_a_server_that_ends_leaves_what_was_recorded(server: LiveServer, tmp_path: Path) -> None:
    out = tmp_path / "trace"

    async def stop() -> None:
        await ask(server.url, "alice-old")
        server.run(end())
        await asyncio.Event().wait()

    async def end() -> None:
        server.service.traces.close()

    totals = asyncio.run(record(RecordOptions(server.url, ["alice-old"], out), stop, lambda _: None))
    assert totals.num_calls == len(out.read_text().splitlines()) == 1


def test_what_goes_wrong_leaves_what_was_recorded(server: LiveServer, tmp_path: Path) -> None:
    out = tmp_path / "trace"

    async def stop() -> None:
        await ask(server.url, "alice-old", "alice-old")
        raise RecordError("something else")

    with pytest.raises(RecordError, match="something else"):
        asyncio.run(record(RecordOptions(server.url, ["alice-old"], out), stop, lambda _: None))
    assert len(read_trace(out)) == 2


def test_two_keys_of_a_tenant(server: LiveServer, tmp_path: Path) -> None:
    code, output = macaw(
        "record", "--url", server.url, "--out", tmp_path / "t", "--api-key", "alice-old", "--api-key", "alice-new"
    )
    assert code == 1
    assert "Two of the API keys are of one tenant" in output


def test_nothing_ran(server: LiveServer, tmp_path: Path) -> None:
    (tmp_path / "tenants").write_text(TOML)
    words = ["--url", server.url, "--out", tmp_path / "t", "--tenants", tmp_path / "tenants", "--seconds", "0"]
    code, output = macaw("record", *words)
    assert code == 1
    assert f"recording {server.url} for 0 s" in output
    assert "No call ended meanwhile" in output


def test_a_wrong_key(server: LiveServer, tmp_path: Path) -> None:
    code, output = macaw("record", "--url", server.url, "--out", tmp_path / "t", "--api-key", "carol")
    assert code == 1
    assert "The API key is not one of this server's" in output


def test_a_wrong_block_size(server: LiveServer, tmp_path: Path) -> None:
    words = ["--url", server.url, "--api-key", "bob-key", "--out", tmp_path / "t"]
    code, output = macaw("record", *words, "--block-size", "3")
    assert code == 1
    assert "give 16 to 65,536 tokens" in output


def test_no_macaw(stranger: str, tmp_path: Path) -> None:
    for url, words in [
        (stranger, "has no /v1/trace: it is no Macaw server"),
        (f"{stranger}/page", "answered with text/html, which no Macaw server does"),
        ("http://127.0.0.1:1", "No Macaw server at http://127.0.0.1:1"),
        ("127.0.0.1", "has no scheme"),
    ]:
        code, output = macaw("record", "--url", url, "--out", tmp_path / "t")
        assert code == 1
        assert words in output


class TestReplay:
    LINE: ClassVar[dict[str, Any]] = {"timestamp": 0, "output_length": 5, "block_size": 64}

    @pytest.fixture
    def trace(self, tmp_path: Path) -> Path:
        """A program that fits, and one that does not."""
        small = {**self.LINE, "input_length": 50, "hash_ids": [0], "app": "small", "tenant": "t7"}
        large = {**self.LINE, "input_length": 600, "hash_ids": list(range(10)), "app": "large", "tenant": "t8"}
        (tmp_path / "trace").write_text("\n".join(map(json.dumps, [small, large])))
        return tmp_path / "trace"

    @pytest.mark.parametrize("way", ["programs", "requests"])
    def test_what_fails_is_told_and_the_rest_goes_on(self, server: LiveServer, trace: Path, way: str) -> None:
        keys = ["--api-key", "alice-old", "--api-key", "bob-key"]
        words = ["--url", server.url, *keys, "--way", way, "--model", "macaw-demo", "--json", trace.with_name("json")]
        code, output = macaw("replay", trace, *words)
        assert code == 1
        assert "small (1)" in output
        assert "large (1)" not in output
        assert "answers 5 tokens; in the trace 5" in output
        assert "failed 1 programs, such as:" in output
        assert "context" in output
        assert "alice-old" not in output
        [case] = json.loads(trace.with_name("json").read_text())["cases"]
        assert [s["app"] for s in case["summaries"]] == ["small"]
        assert {request.salt for request in server.engine.requests} == {salt(server, "alice-old")}

    def test_nothing_is_answered(self, server: LiveServer, trace: Path) -> None:
        trace.write_text(trace.read_text().splitlines()[1])
        code, output = macaw("replay", trace, "--url", server.url, "--api-key", "bob-key", "--model", "macaw-demo")
        assert code == 1
        assert "None of the 1 programs was answered." in output

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--speed", "0"], "--speed 0 was given; it must be above 0"),
            (["--url", "http://127.0.0.1:1"], "http://127.0.0.1:1/v1/models does not list a model: No Macaw server"),
        ],
    )
    def test_what_cannot_be(self, trace: Path, words: list[str], message: str) -> None:
        code, output = macaw("replay", trace, *words)
        assert code == 1
        assert message in output

    def test_no_trace(self, tmp_path: Path) -> None:
        (tmp_path / "t").write_text("hello")
        for file, message in [("t", "Line 1 is not JSON"), ("none", "No such file")]:
            code, output = macaw("replay", tmp_path / file)
            assert code == 1
            assert message in output


def salt(server: LiveServer, key: str) -> str:
    found: str = server.service.tenants.authenticate(f"Bearer {key}").salt
    return found
