"""The Python of README and of the guides runs, against a real server (docs/functions.md: test_functions.py)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from inspect import isawaitable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, PromptTemplate, Settings, SummaryIndex

import macaw
from conftest import TENANTS
from macaw_server.serve import LocalServer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def names(local_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the snippets take for granted."""
    monkeypatch.setenv("MACAW_BASE_URL", local_server.url)
    monkeypatch.setenv("MACAW_API_KEY", TENANTS[0])
    llm = Settings._llm
    documents = [Document(text="A semantic variable is a text with one producer.")]
    with macaw.MacawClient() as client:
        yield {name: getattr(macaw, name) for name in macaw.__all__} | {
            "client": client,
            "chunks": ["a first part", "a second part"],
            "documents": documents,
            "index": SummaryIndex.from_documents(documents),
            "PromptTemplate": PromptTemplate,
            "print": lambda *values, end="\n": None,
        }
    Settings._llm = llm


def snippets(page: str, url: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8").replace("http://127.0.0.1:8000", url)
    text = text.replace('"my-model"', '"macaw-demo", max_tokens=20').replace("Macaw()", "Macaw(max_tokens=20)")
    text = re.sub(r"max_tokens=\d+", "max_tokens=20", text)
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "docs/client.md", "docs/langchain.md", "docs/llamaindex.md"])
async def test_snippets_run(page: str, names: dict[str, Any], local_server: LocalServer) -> None:
    found, client = snippets(page, local_server.url), names["client"]
    assert found
    for number, snippet in enumerate(found):
        names["client"] = client  # what a snippet before called so is closed
        done = eval(compile(snippet, f"{page}[{number}]", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        if isawaitable(done):
            await done


def test_the_explanation_is_as_shown(names: dict[str, Any], local_server: LocalServer) -> None:
    first, second = snippets("docs/langchain.md", local_server.url)[:2]
    lines = second.splitlines()
    exec("\n".join([first, *lines[:-1]]), names)
    explanation = str(eval(lines[-1], names))
    assert f"```\n{explanation.strip()}\n```" in (ROOT / "docs/langchain.md").read_text(encoding="utf-8")
