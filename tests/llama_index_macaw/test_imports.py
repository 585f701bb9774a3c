"""The adapter needs no server side, and is a part of the namespace `llama_index.llms`."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import importlib.metadata
import sys

blocked = ["torch", "macaw_server", "macaw_kernels", "langchain_core"]
if importlib.metadata.version("llama-index-core") >= "0.13":  # before, OpenAILike imports it
    blocked.append("transformers")
for name in blocked:
    sys.modules[name] = None  # importing it fails
import llama_index.llms
import llama_index.llms.macaw as macaw

assert llama_index.__file__ is None
assert llama_index.llms.__file__ is None
macaw.Macaw(model="m")
"""


def test_imports_without_torch_transformers_and_server() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
