from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from macaw_server.cli import app
from macaw_server.scheduler import Coefficients, StepTimeModel
from macaw_server.simulate.model_file import ModelFile, ModelFileError


def macaw(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["simulate", *words])
    return result.exit_code, result.output


def test_a_workload_with_every_option(tmp_path: Path) -> None:
    ModelFile(StepTimeModel(Coefficients(1.0, 0.1, 0, 0, 0)), {"num_pages": 3000, "page_size": 8}).save(
        tmp_path / "model"
    )
    words = ["mixed", "--engines", "2", "--policy", "fcfs,app", "--scale", "0.02", "--programs", "2", "--seed", "3"]
    words += ["--tenants", "2,1", "--client", "requests", "--rtt-ms", "20", "--step-time", str(tmp_path / "model")]
    words += ["--kv-pages", "4000", "--write-trace", str(tmp_path / "trace"), "--json", str(tmp_path / "json")]
    code, output = macaw(*words)
    assert code == 0
    for text in ("fcfs", "app", "tenant t1", "map-reduce: 2", "2 x 4,000 pages of 8", "fixed 1, token 0.1"):
        assert text in output
    runs = json.loads((tmp_path / "json").read_text())["runs"]
    assert [run["policy"] for run in runs] == ["fcfs", "app"]
    assert runs[0]["apps"]["chat"]["num_programs"] == 40
    assert len((tmp_path / "trace").read_text().splitlines()) == runs[0]["num_calls"]
    code, output = macaw(str(tmp_path / "trace"), "--policy", "app")
    assert code == 0
    assert "all programs: 42" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "'nope' is neither a workload (agents,"),
        (["chat", "--policy", "best"], "No scheduling policy 'best'"),
        (["chat", "--client", "http"], "No client 'http'; choose one of programs, requests"),
        (["chat", "--scale", "0"], "must be above 0"),
        (["chat", "--step-time", "/nowhere"], "/nowhere is not a step-time file"),
        (["cost", "--policy", "best"], "No scheduling policy 'best'"),
    ],
)
def test_what_cannot_be_is_said(words: list[str], message: str) -> None:
    code, output = macaw(*words)
    assert code == 1
    assert message in output


def test_cost(tmp_path: Path) -> None:
    code, _ = macaw("cost", "--waiting", "3,40", "--policy", "app", "--json", str(tmp_path / "json"))
    assert code == 0
    found = json.loads((tmp_path / "json").read_text())
    assert [each["num_waiting"] for each in found] == [3, 40]
    assert min(each["us_per_call"] for each in found) > 0


def test_a_model_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    ModelFile(StepTimeModel(), {"num_pages": 7}, {"model": "m"}).save(tmp_path / "f")
    loaded = ModelFile.load(tmp_path / "f")
    assert (loaded.limits, loaded.facts) == ({"num_pages": 7}, {"model": "m"})
    assert loaded.step_time.coefficients == StepTimeModel().coefficients
    (tmp_path / "f").write_text("{}")
    with pytest.raises(ModelFileError, match="macaw simulate fit"):
        ModelFile.load(tmp_path / "f")
