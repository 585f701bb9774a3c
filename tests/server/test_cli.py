"""The command line: flags derive from the configuration, wrong ones are said, missing extras too."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from macaw_server.cli import _config, app
from macaw_server.config import EngineConfig, ServerConfig, parse_size
from macaw_server.errors import ConfigError


def test_every_field_is_a_flag_and_says_its_default() -> None:
    command = typer.main.get_command(app).get_command(None, "serve")
    flags = {parameter.name: parameter for parameter in command.params}
    assert flags.keys() == ServerConfig.model_fields.keys()
    assert flags["max_model_len"].opts == ["--max-model-len"]
    assert flags["port"].help == "Port to listen on; 0 picks a free one. (default: 8000)"
    assert "macaw-demo" in CliRunner().invoke(app, ["serve", "--help"]).output


def test_switches_are_set_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    command = typer.main.get_command(app).get_command(None, "serve")
    on = command.make_context("serve", ["m", "--overlap", "--no-cuda-graphs"]).params
    config = _config(on)
    assert (config.overlap, config.cuda_graphs, config.native) == (True, False, True)
    switches = ["prefix-caching", "single-flight", "task-groups", "prefill-ahead", "pipelining"]
    off = _config(command.make_context("serve", ["m", *(f"--no-{name}" for name in switches)]).params)
    assert not any(getattr(off, name.replace("-", "_")) for name in switches)
    monkeypatch.setenv("MACAW_OVERLAP", "0")
    assert (_config({}).overlap, _config({"overlap": True}).overlap) == (False, True)


def test_flags_win_over_variables_and_these_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACAW_PORT", "9001")
    monkeypatch.setenv("MACAW_KV_MEMORY", "2GiB")
    assert (_config({}).port, _config({}).kv_memory) == (9001, 2**31)
    assert _config({"port": "9002", "kv_memory": None, "api_key": []}).port == 9002
    assert _config({"api_key": ["a", "b"]}).api_key == ("a", "b")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "99999"}, "--port='99999'"),
        ({"page_size": "13"}, "13 is not a power of two"),
        ({"kv_memory": "2 bananas"}, "such as 4GiB"),
        ({"max_num_seqs": "0"}, "--max-num-seqs='0'"),
        ({"placement": "round-robin"}, "--placement='round-robin': Input should be 'affinity' or 'least-loaded'"),
        (
            {"shared_prefix": ["rules.txt"], "prefix_caching": False},
            r"--shared-prefix=.*: nothing is shared with --no-prefix-caching; leave out one of the two",
        ),
    ],
)
def test_a_wrong_flag_is_named(flags: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _config(flags)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACAW_PORT", "harbour")
    with pytest.raises(ConfigError, match="MACAW_PORT='harbour'"):
        _config({})


def test_sizes() -> None:
    assert [parse_size(s) for s in ("1024", "1K", "1.5GiB", "2 mb")] == [1024, 1024, 3 * 2**29, 2**21]


def test_the_engine_gets_its_part_and_its_part_only() -> None:
    engine = _config({"model": "m", "max_num_seqs": "3"}).engine()
    assert type(engine) is EngineConfig
    assert (engine.model, engine.max_num_seqs) == ("m", 3)


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocker())
sys.argv = ["macaw", *{arguments!r}]
from macaw_server.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("package", "arguments", "words"),
    [
        ("typer", ["serve"], "pip install 'macaw[server]'"),
        ("langchain_openai", ["demo"], "pip install 'macaw[all]'"),
    ],
)
def test_a_missing_extra_is_said(package: str, arguments: list[str], words: str) -> None:
    code = BLOCKED.format(package=package, arguments=arguments)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
