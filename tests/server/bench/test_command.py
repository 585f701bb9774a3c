"""`macaw bench engine` as its user runs it: a real server against itself, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from conftest import TENANTS
from macaw_server.cli import app
from macaw_server.serve import LocalServer

SMALL = ["--concurrency", "1,3", "--prefix", "48", "--own", "8", "--out", "4", "--rounds", "2"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "engine", *arguments])


def test_macaw_against_itself(local_server: LocalServer, tmp_path: Path) -> None:
    json_file, markdown_file = tmp_path / "out.json", tmp_path / "out.md"
    keys = ["--api-key", TENANTS[0], "--peer-api-key", TENANTS[1]]  # tenants share no cache: cold is cold on both
    files = ["--json", str(json_file), "--markdown", str(markdown_file)]
    result = run("--url", local_server.url, "--peer", f"{local_server.url}/v1", *keys, *SMALL, *files)
    assert result.exit_code == 0, result.output
    written = json.loads(json_file.read_text())
    names = ["single-warm", "single-cold", "shared-3-warm", "shared-3-cold", "unshared-3-warm", "unshared-3-cold"]
    assert [(s["case"], s["side"]) for s in written["summaries"]] == [(n, s) for n in names for s in ("macaw", "peer")]
    for summary in written["summaries"]:
        assert (summary["ratio"] is None) == (summary["side"] == "peer")
        rates = [*summary["tokens_per_s"].values(), *(summary["ratio"] or {}).values()]
        assert all(math.isfinite(rate) and rate > 0 for rate in rates)
        assert summary["case"] in result.output
        assert f"| {summary['case']} | {summary['side']} |" in markdown_file.read_text()
    cached = {s["case"]: s["cached_share"] for s in written["summaries"] if s["side"] == "macaw"}
    assert cached["unshared-3-warm"] == cached["single-warm"] == 48 / 56
    assert cached["unshared-3-cold"] == cached["single-cold"] == 0
    assert written["facts"]["limit"] == "not known without --model"
    assert not set(TENANTS) & set(written["facts"]["command"].split())


def test_a_peer_that_is_not_there(local_server: LocalServer, unused_tcp_port: int) -> None:
    peer = f"http://127.0.0.1:{unused_tcp_port}"
    result = run("--url", local_server.url, "--api-key", TENANTS[0], "--peer", peer, *SMALL)
    assert result.exit_code == 1
    assert f"error: peer: {peer}/v1/models does not list a model" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give --url of a running one, or --model"),
        (["--url", "http://127.0.0.1:1", "--", "--threads", "2"], "--threads 2 is for a server that is started"),
        (["--url", "http://127.0.0.1:1", "--cases", "warm"], "No case matches 'warm'"),
        (["--model", "macaw-demo", "--dtype", "int4"], "--dtype 'int4' was given"),
        (["--model", "/no/such/folder"], "No folder /no/such/folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], words: str) -> None:
    result = run("--peer", "http://127.0.0.1:1", *arguments)
    assert result.exit_code == 1
    assert words in result.output


@pytest.mark.parametrize(("flag", "value"), [("--concurrency", "8,"), ("--ids", "20:10"), ("--out", "1")])
def test_a_wrong_flag_is_named(flag: str, value: str) -> None:
    result = run("--peer", "http://127.0.0.1:1", flag, value)
    assert result.exit_code == 2
    assert flag in result.output


@pytest.mark.slow
def test_it_starts_a_server_of_its_own_and_states_the_limit(local_server: LocalServer, tmp_path: Path) -> None:
    json_file = tmp_path / "out.json"
    serve = ["--", "--max-model-len", "512", "--threads", "1"]
    own = ["--model", "macaw-demo", "--dtype", "float32", "--cases", "single-warm", "--json", str(json_file)]
    result = run("--peer", local_server.url, "--peer-api-key", TENANTS[0], *SMALL, *own, *serve)
    assert result.exit_code == 0, result.output
    written = json.loads(json_file.read_text())
    assert written["limits"].keys() == {"single-warm"}
    assert all(summary["limit_share"] > 0 for summary in written["summaries"])


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(local_server: LocalServer) -> None:
    result = run("--peer", local_server.url, "--model", "macaw-demo", "--", "--page-size", "13")
    assert result.exit_code == 1
    assert "macaw serve did not start" in result.output
    assert "13 is not a power of two" in result.output
