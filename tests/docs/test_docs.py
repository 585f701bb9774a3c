"""What README, docs and notebooks point to is there: files, headings, commands with their flags, make targets."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from macaw_server.cli import app
from macaw_server.workloads import read_trace, write_trace

ROOT = Path(__file__).parents[2]
SOURCES = ("docs", "integrations", "kernels", "notebooks", "server", "tests")
FILES = {str(path.relative_to(ROOT)) for top in SOURCES for path in (ROOT / top).rglob("*.*")}
PAGES = ["README.md", "CHANGELOG.md", *sorted(name for name in FILES if name.endswith((".md", ".ipynb")))]
MACAW = typer.main.get_command(app)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PLACEHOLDERS = {"WORKLOAD": "mixed", "WORKLOAD|all": "mixed", "WORKLOAD|TRACE": "run"}

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\((?!\w+:)([^)\s]*)\)")
_FILE = re.compile(r"(?:[\w-]+/)*[\w-]+\.(?:py|cpp|h|sh|md|ipynb)")


def prose(page: str) -> str:
    """The Markdown of a page; a notebook's cells of text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return text


def code(page: str) -> Iterator[str]:
    """Inline code, and the lines of blocks that are no program: commands, among others."""
    text = prose(page)
    for language, block in _FENCED.findall(text):
        if not language:
            yield from block.replace("\\\n", " ").splitlines()
    yield from (span.replace("\n", " ") for span in _INLINE.findall(_FENCED.sub("", text)))


def anchors(page: str) -> set[str]:
    """The headings of a page, as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", prose(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: str) -> Iterator[tuple[str, str]]:
    """Pages or files, relative to the repository, and the heading there or nothing."""
    for link in _LINK.findall(_INLINE.sub("", _FENCED.sub("", prose(page)))):
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        yield str(path.resolve().relative_to(ROOT)), anchor


def flags(line: str) -> set[str]:
    return set(re.findall(r"(?<![\w=-])--[a-z][a-z-]+", line))


def macaw_flags(words: list[str]) -> set[str]:
    """All flags of a `macaw` command; a workload may stand in the place of a command's name."""
    command = MACAW
    for word in words:
        if isinstance(command, TyperGroup):
            word = PLACEHOLDERS.get(word, word)
            found = command.get_command(typer.Context(command), word)
            assert found or command.name == "simulate", f"no command {word}"
            command = found or command.commands["run"]
    return {"--help"}.union(*([*parameter.opts, *parameter.secondary_opts] for parameter in command.params))


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    for path, anchor in links(page):
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(path), f"{path} has no heading #{anchor}"


def test_every_page_is_found_from_the_readme() -> None:
    found, new = set(), {"README.md"}
    while new:
        found |= new
        new = {path for page in new for path, _ in links(page) if path.endswith((".md", ".ipynb"))} - found
    assert {page for page in PAGES if page.startswith(("docs/", "notebooks/"))} <= found


@pytest.mark.parametrize("page", PAGES)
def test_files(page: str) -> None:
    for span in code(page):
        for name in _FILE.findall(span) if "<" not in span else ():
            assert any(f"/{file}".endswith(f"/{name}") for file in FILES | {"README.md"}), name


@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str) -> None:
    for span in code(page):
        line = span.removeprefix("$ ").partition("#")[0]
        match line.split():
            case ["macaw", word, *_] if word != "demo":  # which loads LangChain, and has one flag
                assert_flags(line)
            case ["python", "-m", module, *_]:
                source = (ROOT / "server" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
                assert all(f" {flag[2:]}: Annotated[" in source for flag in flags(line)), line
            case ["python", script, *_]:
                source = (ROOT / script).read_text(encoding="utf-8")
                assert all(f'"{flag}"' in source for flag in flags(line)), line
            case ["make", *_]:
                for word in shlex.split(line)[1:]:
                    name, is_variable, value = word.partition("=")
                    assert (f"$({name})" if is_variable else f"\n{name}: ") in MAKEFILE, line
                    if name == "BENCH":
                        assert_flags(f"macaw bench WORKLOAD {value}")


@pytest.mark.parametrize("extra", ["", "--repeat 1 --ablate all -- --engines 2"])
def test_make_bench_runs_a_command_that_is_there(extra: str) -> None:
    make = ["make", "--no-print-directory", "--dry-run", "--old-file=.venv/.installed", "bench", f"BENCH={extra}"]
    (command,) = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert command.startswith(".venv/bin/macaw bench all --")
    assert command.endswith(f" {extra}")
    assert_flags(command.removeprefix(".venv/bin/"))


def assert_flags(line: str) -> None:
    """The command line is one of `macaw` with flags that it has, and behind ``--`` those of `macaw serve`."""
    command, _, rest = line.partition(" -- ")
    words = command.split()
    assert words[0] == "macaw"
    assert flags(command) <= macaw_flags(words[1:]), line
    assert flags(rest) <= macaw_flags(["serve"]), line


def test_the_trace_is_as_it_would_be_written(tmp_path: Path) -> None:
    [lines] = [block for language, block in _FENCED.findall(prose("docs/traces.md")) if language == "json"]
    shown, written = tmp_path / "shown", tmp_path / "written"
    shown.write_text(lines, encoding="utf-8")
    [program] = read_trace(shown)
    assert program.calls[1].deps == ("call0",)
    write_trace([program], written, block_size=16)
    assert written.read_text(encoding="utf-8") == lines
