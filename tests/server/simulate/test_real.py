"""The simulator and a real engine run the same programs; times are not compared here, all else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from macaw_server.cli import app
from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.scheduler import StepTimeModel
from macaw_server.simulate.real import RealRun, config_of
from macaw_server.simulate.virtual import Simulation
from macaw_server.workloads import CallSpec, Output, ProgramSpec, Text

ENGINE = EngineConfig(kv_memory="64MiB", max_num_seqs=8, threads=1, native=False)


@pytest.fixture(scope="module")
def core() -> EngineCore:
    return EngineCore(ENGINE)


def program(name: str, **fields: object) -> ProgramSpec:
    shared = Text("shared", 100)
    maps = [CallSpec(f"map{i}", (shared, Text(f"{name}/{i}", 30)), 5) for i in range(3)]
    reduce = CallSpec("reduce", (Text("reduce", 20), *(Output(c.id) for c in maps)), 4)
    last = CallSpec("last", (*reduce.parts, Output("reduce"), Text("tool", 7)), 3, gap_s=0.01)
    return ProgramSpec(name, "app", 0.0, (*maps, reduce, last), ("last",), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("client", ["programs", "requests"])
def test_a_real_engine_does_what_the_simulator_says(core: EngineCore, client: str) -> None:
    programs = [program("p", tenant=f"{client}/x"), program("q", tenant=f"{client}/y")]
    real = {r.spec.id: r for r in RealRun(core, programs, client=client).run().programs}  # type: ignore[arg-type]
    simulated = Simulation(config_of(core, ENGINE), StepTimeModel(), programs).run()
    for record in simulated.programs:
        for name, expected in record.calls.items():
            call = real[record.spec.id].calls[name]
            assert (call.prompt_len, call.output_len) == (expected.prompt_len, expected.output_len)
            assert call.cached_tokens == expected.cached_tokens
            assert call.ready_s <= call.started_s < call.first_token_s <= call.ended_s


def test_a_deadline_stops_a_real_engine(core: EngineCore) -> None:
    endless = ProgramSpec("e", "app", 0.0, (CallSpec("a", (Text("e", 9),), 7000),), ("a",), deadline_s=0.05)
    [record] = RealRun(core, [endless]).run().programs
    assert record.error == "deadline_exceeded"
    assert not core.has_work
    assert core.stats().pages_used == 0


def test_fit_and_check(tmp_path: Path) -> None:
    runner, flags = CliRunner(), ["--", "--max-num-seqs", "4", "--kv-memory", "64MiB", "--threads", "1"]
    words = ["simulate", "fit", "--seconds", "0", "--max-prompt-len", "64", "--out", str(tmp_path / "model")]
    result = runner.invoke(app, [*words, *flags])
    assert result.exit_code == 0, result.output
    fitted = json.loads((tmp_path / "model").read_text())
    assert fitted["limits"]["max_num_seqs"] == 4
    assert max(fitted["step_time"]["coefficients"].values()) > 0
    words = ["simulate", "check", "--step-time", str(tmp_path / "model"), "--workloads", "map-reduce", "--rounds", "1"]
    words += ["--programs", "1", "--scale", "0.005", "--json", str(tmp_path / "json")]
    result = runner.invoke(app, [*words, *flags])
    assert result.exit_code == 0, result.output
    [found] = json.loads((tmp_path / "json").read_text())["workloads"]
    assert (found["workload"], found["num_programs"]) == ("map-reduce", 1)
