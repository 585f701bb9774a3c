"""The adapter needs no server side."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys

for name in ("torch", "transformers", "macaw_server", "macaw_kernels"):
    sys.modules[name] = None  # importing it fails
import langchain_macaw

langchain_macaw.compile(langchain_macaw.ChatMacaw(model="m"))
"""


def test_imports_without_torch_transformers_and_server() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
