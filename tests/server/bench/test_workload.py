"""`macaw bench WORKLOAD`: the two clients do the same work, and what is told of it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import TENANTS
from macaw_server.bench.errors import BenchError
from macaw_server.bench.workload.clients import Way, WorkloadClient, _later
from macaw_server.bench.workload.records import Outcome, Run
from macaw_server.bench.workload.sides import MACAW, SWITCHES, choose_sides
from macaw_server.bench.workload.summary import summarize
from macaw_server.bench.workload.texts import Texts
from macaw_server.cli import app
from macaw_server.config import EngineConfig
from macaw_server.models.loader import load_tokenizer
from macaw_server.serve import LocalServer
from macaw_server.workloads import CallSpec, Output, ProgramSpec, Text, WorkloadOptions, make_workload

OPTIONS = WorkloadOptions(scale=0.01)


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts(load_tokenizer(EngineConfig()), seed=3)


def test_texts_have_their_length_and_follow_from_the_seed(texts: Texts) -> None:
    tokenizer = load_tokenizer(EngineConfig())
    part, other = Text("a", 50), Text("b", 50)
    assert len(tokenizer.encode(texts[part] + texts[other], add_special_tokens=False)) == 100
    assert texts[part] == Texts(tokenizer, seed=3)[part] != Texts(tokenizer, seed=4)[part]
    assert texts[part] != texts[other]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    ("workload", "num_programs"),
    [("chain-summary", 1), ("map-reduce", 1), ("copilot", 2), ("gpts", 2), ("multi-agent", 1), ("agents", 1)],
)
async def test_requests_and_programs_do_the_same_work(
    local_server: LocalServer, texts: Texts, workload: str, num_programs: int, chat: bool
) -> None:
    programs = [
        replace(spec, arrival_s=0.0, calls=tuple(replace(call, gap_s=min(call.gap_s, 0.001)) for call in spec.calls))
        for spec in islice(make_workload(workload, OPTIONS), num_programs)
    ]

    async def run(way: Way, tenant: str) -> Run:
        async with WorkloadClient(local_server.url, "macaw-demo", tenant, way, texts, chat=chat) as client:
            return await client.run(programs, timeline=True)

    plain, whole = await run("requests", TENANTS[0]), await run("programs", TENANTS[1])
    for one, other in zip(plain.outcomes, whole.outcomes, strict=True):
        assert one.answers == other.answers
        assert set(one.answers) == set(one.spec.targets)
        assert (one.prompt_tokens, one.output_tokens) == (other.prompt_tokens, other.output_tokens)
        assert one.num_requests == len(one.spec.calls)
        assert other.num_requests == 1 + sum(call.gap_s > 0 for call in other.spec.calls)
        assert 0 < other.first_token_s <= other.ended_s
    assert not plain.timeline
    assert whole.timeline.startswith("<svg")


async def test_a_failed_call_is_told_as_such(local_server: LocalServer, texts: Texts) -> None:
    spec = ProgramSpec("p", "app", 0.0, (CallSpec("a", (Text("t", 3),), 4),), ("a",))
    async with WorkloadClient(local_server.url, "no-such-model", TENANTS[0], "requests", texts) as client:
        with pytest.raises(BenchError, match="no-such-model"):
            await client.run([spec])


def test_what_waits_for_a_gap_comes_later() -> None:
    calls = (
        CallSpec("a", (Text("t", 3),), 1),
        CallSpec("b", (Output("a"),), 1, gap_s=1.0),
        CallSpec("c", (Output("b"),), 1),
        CallSpec("d", (Output("a"),), 1),
    )
    spec = ProgramSpec("p", "app", 0.0, calls, ("c", "d"))
    assert list(_later(spec, {"b"})) == ["b", "c"]
    assert not _later(spec, ())


def test_ratios_are_taken_within_a_round() -> None:
    spec = ProgramSpec("p", "app", 1.0, (CallSpec("a", (Text("t", 3),), 10),), ("a",))

    def rounds(*latencies_s: float) -> list[Run]:
        return [Run([Outcome(spec, first_token_s=1.0, ended_s=1.0 + s, prompt_tokens=4)]) for s in latencies_s]

    base, macaw = summarize({"requests": rounds(2.0, 8.0), "macaw": rounds(1.0, 2.0)}, slo_token_ms=150.0)
    assert base.gain is None
    assert macaw.gain is not None
    assert (macaw.gain.low, macaw.gain.median, macaw.gain.high) == (2.0, 3.0, 4.0)
    assert (base.slo_share, macaw.slo_share) == (0.0, 0.5)
    assert macaw.latency_s.median == 1.5


def test_sides() -> None:
    names = [side.name for side in choose_sides(["all"], "http://127.0.0.1:1/v1")]
    assert names[:3] == ["requests", "peer", MACAW.name]
    assert len(names) == 3 + len(SWITCHES)
    with pytest.raises(BenchError, match=r"--ablate magic was given; programs, policy, .* or all are accepted"):
        choose_sides(["magic"], None)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    arguments = [
        "copilot",
        "--programs",
        "2",
        "--scale",
        "0.01",
        "--repeat",
        "1",
        "--rtt-ms",
        "0,1",
        "--slo-ms",
        "1000",
    ]
    server = ["--", "--threads", "1", "--kv-memory", "16MiB", "--max-model-len", "512"]
    result = CliRunner().invoke(app, ["bench", *arguments, "--ablate", "policy", "--out", str(tmp_path), *server])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "results.json").read_text())
    assert [case["name"] for case in written["cases"]] == ["copilot, 0 ms", "copilot, 1 ms"]
    for case in written["cases"]:
        assert [s["side"] for s in case["summaries"]] == ["requests", "macaw", "without policy app"]
        assert case["equal_share"] == 1.0
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rtt-ms", "fast"], "numbers with commas are accepted"),
        (["--ablate", "magic"], "--ablate magic was given"),
        (["--scale", "0"], "A scale of 0.0 leaves no tokens"),
        (["--model", "/no/such/folder"], "No folder /no/such/folder"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "copilot", *arguments])
    assert result.exit_code != 0
    assert words in " ".join(result.output.replace("│", " ").split())
