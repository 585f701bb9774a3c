"""`macaw bench WORKLOAD`: the two clients do the same work, and what is told of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from conftest import TENANTS
from macaw_server.bench.errors import BenchError
from macaw_server.bench.report import Spread
from macaw_server.bench.workload.clients import Way, WorkloadClient, _later
from macaw_server.bench.workload.gain_pictures import draw_gains
from macaw_server.bench.workload.gains import switch_gains
from macaw_server.bench.workload.records import Outcome, Run
from macaw_server.bench.workload.report import CaseResult, WorkloadReport
from macaw_server.bench.workload.sides import BASELINES, MACAW, SWITCHES, Side, choose_sides, left_out
from macaw_server.bench.workload.summary import summarize
from macaw_server.bench.workload.texts import Texts
from macaw_server.cli import _config, app
from macaw_server.config import EngineConfig, ServerConfig
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


@pytest.mark.parametrize(
    ("workload", "num_programs", "chat"),
    [
        ("chain-summary", 1, True),
        ("map-reduce", 1, True),
        ("map-reduce", 1, False),
        ("copilot", 2, True),
        ("gpts", 2, True),
        ("multi-agent", 1, True),
        ("agents", 1, True),
    ],
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


ENGINES = ["--engines", "2"]


def test_sides() -> None:
    names = [side.name for side in choose_sides(["all"], "http://127.0.0.1:1/v1", serve_flags=ENGINES)]
    assert names[:3] == ["requests", "peer", MACAW.name]
    assert len(names) == 3 + len(SWITCHES)
    with pytest.raises(BenchError, match=r"--ablate magic was given; programs, prefix-caching, .* or all are accepted"):
        choose_sides(["magic"], None)
    names = [side.name for side in choose_sides([], None, ["uncached", "requests"])]
    assert names == ["uncached requests", "requests", "macaw"]
    with pytest.raises(BenchError, match=r"--baseline vllm was given; requests, uncached are accepted"):
        choose_sides([], None, ["vllm"])


@pytest.mark.parametrize("flags", [[], ["--engines", "1"], ["--engines=1"], ["--max-num-seqs", "2"]])
def test_placement_is_left_out_of_all_where_there_is_one_engine(flags: list[str]) -> None:
    assert SWITCHES["placement"] not in choose_sides(["all"], None, serve_flags=flags)
    assert "-- --engines 2" in (left_out(["all"], flags) or "")
    with pytest.raises(BenchError, match=r"--ablate placement was given: .*give -- --engines 2"):
        choose_sides(["placement"], None, serve_flags=flags)
    for several in (ENGINES, ["--engines=2"]):
        assert choose_sides(["placement"], None, serve_flags=several)[-1] == SWITCHES["placement"]
        assert left_out(["all"], several) is None
    assert left_out(["policy"], flags) is None


@pytest.mark.parametrize("side", [*SWITCHES.values(), *BASELINES.values()], ids=lambda side: side.name)
def test_every_side_is_a_server_that_differs_in_one_thing(side: Side) -> None:
    command = typer.main.get_command(app).get_command(None, "serve")  # type: ignore[attr-defined]
    config = _config(command.make_context("serve", ["macaw-demo", *side.flags]).params)
    default = ServerConfig(model="macaw-demo")
    changed = [name for name in ServerConfig.model_fields if getattr(config, name) != getattr(default, name)]
    assert len(changed) == len(side.flags) - sum(not flag.startswith("--") for flag in side.flags)
    if side.switch is not None:
        assert len(changed) == (0 if side.switch == "programs" else 1)


def gain_rounds() -> dict[str, list[Run]]:
    def run(**latencies_s: float) -> Run:
        outcomes = []
        for name, latency_s in latencies_s.items():
            spec = ProgramSpec(name, name, 1.0, (CallSpec("a", (Text("t", 3),), 10),), ("a",))
            outcomes.append(Outcome(spec, ended_s=1.0 + latency_s))
        return Run(outcomes)

    return {
        "requests": [run(chat=4.0, map=8.0), run(chat=6.0, map=8.0)],
        "macaw": [run(chat=1.0, map=4.0), run(chat=2.0, map=4.0)],
        "without policy": [run(chat=2.0, map=3.0), run(chat=2.0, map=4.0)],
    }


def test_the_gain_of_a_switch_is_latency_without_it_over_latency_with_all() -> None:
    alone, together = switch_gains(gain_rounds())
    assert (alone.name, together.name) == ("policy", "all (requests)")
    assert alone.by_app == {"chat": Spread(1.5, 1.0, 2.0), "map": Spread(0.875, 0.75, 1.0)}
    assert together.by_app["chat"] == Spread(3.5, 3.0, 4.0)
    rounds = gain_rounds()
    del rounds["without policy"]
    assert switch_gains(rounds) == []


def test_gains_are_reported_and_drawn() -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    result = CaseResult("mixed", "mixed, 50 ms", gain_rounds(), 1.0)
    report = WorkloadReport([result], {})
    assert "| policy | 1.50x (1.00 - 2.00) | 0.88x (0.75 - 1.00) |" in report.as_markdown()
    assert json.loads(report.as_json())["cases"][0]["gains"][0]["by_app"]["chat"]["median"] == 1.5
    console = Console(record=True, width=150)
    report.print(console)
    assert "all (requests)" in console.export_text()
    figure = figure_module.Figure()
    assert draw_gains(figure, result)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["policy", "all (requests)"]
    bars = [(bar.get_x(), round(bar.get_x() + bar.get_width(), 3)) for bar in axis.patches]
    assert bars == [(1, 1.5), (1, 3.5), (1, 0.875), (1, 2.0)]
    low, high = axis.get_xlim()
    assert low < 0.75 < 4.0 < high
    assert not draw_gains(figure_module.Figure(), replace(result, rounds={"macaw": gain_rounds()["macaw"]}))


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
        assert [s["side"] for s in case["summaries"]] == ["requests", "macaw", "without policy"]
        assert case["equal_share"] == 1.0
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.slow
def test_the_search_for_the_rate(tmp_path: Path) -> None:
    arguments = ["gpts", "--rate", "auto", "--slo-ms", "30", "--probe-s", "0.2", "--programs", "4", "--repeat", "1"]
    server = ["--", "--threads", "1", "--kv-memory", "16MiB", "--max-model-len", "512"]
    result = CliRunner().invoke(
        app, ["bench", *arguments, "--scale", "0.01", "--rtt-ms", "0", "--out", str(tmp_path), *server]
    )
    assert result.exit_code == 0, result.output
    assert "min at most" in result.output
    (found,) = json.loads((tmp_path / "results.json").read_text())["rates"]
    assert [summary["side"] for summary in found["summaries"]] == ["requests", "macaw"]
    assert found["slo"] == {"token_ms": 30.0, "share": 0.9}
    for rounds in found["rounds"].values():
        assert len(rounds) == 1
        for one in rounds:
            assert one["rate"] == max((p["rate"] for p in one["probes"] if p["sustained"]), default=0)
            for tried in one["probes"]:
                assert tried["num_programs"] == max(4, math.ceil(tried["rate"] * 0.2))
    assert (tmp_path / "gpts-0ms-rates.png").exists()
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "sustained with 90% of the programs within 30 ms/token" in page
    assert "sustained with 90%" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "fast"], "programs per second with commas are accepted, such as 1,2,4, or auto"),
        (["--rate", "auto"], "--rate auto needs --slo-ms"),
        (["--rate", "auto", "--slo-ms", "0"], "--slo-ms 0 was given; it must be above 0"),
        (["--rate", "auto", "--slo-ms", "9", "--slo-share", "90"], "a share above 0 up to 1 is accepted"),
        (["--rtt-ms", "fast"], "numbers with commas are accepted"),
        (["--ablate", "magic"], "--ablate magic was given"),
        (["--ablate", "placement"], "give -- --engines 2"),
        (["--baseline", "magic"], "--baseline magic was given"),
        (["--scale", "0"], "A scale of 0.0 leaves no tokens"),
        (["--model", "/no/such/folder"], "No folder /no/such/folder"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "copilot", *arguments])
    assert result.exit_code != 0
    assert words in " ".join(result.output.replace("│", " ").split())
