"""`import macaw` is cheap and plain: checked in fresh interpreters."""

import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import macaw
from macaw.async_client import AsyncMacawClient, AsyncProgramStream
from macaw.client import MacawClient, ProgramStream

ROOT = Path(__file__).parents[2]

EXPORTS = [
    "AnyEvent",
    "AsyncMacawClient",
    "AsyncProgramStream",
    "CallCompleted",
    "CallDelta",
    "CallError",
    "CallFailed",
    "CallStarted",
    "CancelledError",
    "ConnectionFailedError",
    "ContextLengthError",
    "DeadlineExceededError",
    "EngineFailedError",
    "Function",
    "Input",
    "InternalServerError",
    "InvalidProgramError",
    "InvalidRequestError",
    "MacawClient",
    "MacawError",
    "NativeFunction",
    "NativeFunctionError",
    "NotFoundError",
    "Output",
    "OverloadedError",
    "Program",
    "ProgramBuilder",
    "ProgramCompleted",
    "ProgramCreated",
    "ProgramFailed",
    "ProgramGrowth",
    "ProgramRequest",
    "ProgramState",
    "ProgramStream",
    "Ref",
    "RequestError",
    "Sampling",
    "SemanticVariable",
    "ServerError",
    "Session",
    "UnauthorizedError",
    "UnknownModelError",
    "UpstreamFailedError",
    "VariableResolved",
    "__version__",
    "current_session",
    "function",
    "join",
    "native_function",
    "session",
    "variable",
]

PRINT_MODULES = "import json, sys; print(json.dumps(sorted(sys.modules)))"

BLOCK_AND_USE_EVERYTHING = """
import importlib.abc, json, pkgutil, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(f"{{name}} must not be needed")

sys.meta_path.insert(0, Block())
import macaw
for name in macaw.__all__:
    getattr(macaw, name)
for module in pkgutil.walk_packages(macaw.__path__, "macaw."):
    importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""


def modules_after(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout))


def test_import_brings_neither_pydantic_nor_httpx():
    loaded = modules_after(f"import macaw; {PRINT_MODULES}")
    assert "macaw" in loaded
    assert not loaded & {"pydantic", "pydantic_core", "httpx", "asyncio", "macaw.protocol", "macaw.client"}


def test_errors_come_alone():
    loaded = modules_after("import json, sys; from macaw import MacawError; print(json.dumps(sorted(sys.modules)))")
    assert "macaw.errors" in loaded
    assert not loaded & {"pydantic", "httpx"}


def test_everything_works_without_torch_or_any_framework():
    blocked = {"torch", "transformers", "numpy", "starlette", "uvicorn", "langchain_core", "macaw_server"}
    loaded = modules_after(BLOCK_AND_USE_EVERYTHING.format(blocked=blocked))
    assert {"macaw.client", "macaw.async_client", "macaw.builder"} <= loaded
    assert not loaded & blocked


def test_exports_are_pinned():
    assert macaw.__all__ == EXPORTS
    assert dir(macaw) == EXPORTS


@pytest.mark.parametrize("name", EXPORTS)
def test_export_exists(name):
    assert getattr(macaw, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'macaw' has no attribute 'Client'"):
        _ = macaw.Client


def test_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert macaw.__version__ == project["version"]


def public(cls):
    """Public names of a class, with the parameters of what can be called."""
    members = {name: value for name, value in vars(cls).items() if not name.startswith("_")}
    return {
        name: list(inspect.signature(value).parameters.values()) if callable(value) else None
        for name, value in members.items()
    }


@pytest.mark.parametrize(("sync", "twin"), [(MacawClient, AsyncMacawClient), (ProgramStream, AsyncProgramStream)])
def test_both_clients_have_the_same_methods(sync, twin):
    assert public(sync) == public(twin)


def test_both_clients_take_the_same_arguments():
    assert list(inspect.signature(MacawClient).parameters) == list(inspect.signature(AsyncMacawClient).parameters)
