"""Every notebook runs from top to bottom, and is committed with its outputs."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_PATH = re.compile(r"(?<![\w.:/])/(home|root|work|tmp|usr|Users)/")

pytestmark = pytest.mark.filterwarnings("default")  # nbclient's and Jupyter's own


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()  # an exception in a cell is one here


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_as_it_ran(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {"text/plain", "image/svg+xml", "image/png"} <= {kind for o in outputs for kind in o.get("data", {})}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert not _PATH.search("".join(map(str, outputs)))
