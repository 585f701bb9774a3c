"""The native CPU kernels: compiled by the machine's own C++ compiler on first use, for its own processor.

The sources have a C interface and know nothing of torch, so that a build takes seconds and fits any version of torch.
A library is kept in the user's cache under a name that depends on the sources, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-Wall", "-Wno-psabi"),
]
_BUILD_TIMEOUT_S = 600


class NativeBuildError(Exception):
    """There are no native kernels on this machine; the message says why."""


@cache
def load_library() -> ctypes.CDLL:
    """Return the kernels as a shared library, built if need be (once, some seconds).

    The library lies in ``$MACAW_CACHE_DIR`` (default ``~/.cache/macaw``). ``MACAW_NATIVE=0`` does without it, ``CXX``
    names the compiler. ``MACAW_NATIVE_ARCH`` is its ``-march`` where not this processor is meant but less of it, such
    as ``x86-64-v3``: what others have can so be tested here.

    Raises:
        NativeBuildError: No compiler, or it cannot compile the kernels.
    """
    if os.environ.get("MACAW_NATIVE", "1") == "0":
        raise NativeBuildError("MACAW_NATIVE=0 switches them off")
    compiler = _compiler()
    library = cache_dir() / f"kernels-{_fingerprint(compiler)}.so"
    if not library.exists():
        _build(compiler, library)
    import torch  # noqa: F401  (its OpenMP runtime comes first, so that there is one, not two)

    try:
        return ctypes.CDLL(str(library))
    except OSError as e:
        raise NativeBuildError(f"{library} cannot be loaded: {e}") from e


def cache_dir() -> Path:
    """Where built kernels and fitted profiles are kept."""
    if chosen := os.environ.get("MACAW_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "macaw"


def _flags() -> list[str]:
    return [f"-march={os.environ.get('MACAW_NATIVE_ARCH') or 'native'}", *FLAGS]


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise NativeBuildError(f"no C++ compiler ({', '.join(names)}); install g++, or set CXX")


def _fingerprint(compiler: str) -> str:
    """Sources, flags, compiler and processor: what the library depends on."""
    parts = [" ".join(_flags()), compiler, platform.machine(), _processor()]
    try:
        parts.append(subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError) as e:
        raise NativeBuildError(f"{compiler} does not run: {e}") from e
    for path in sorted(SOURCES.iterdir()):
        parts += [path.name, path.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Model and instruction sets: ``-march=native`` means something else on another processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _build(compiler: str, library: Path) -> None:
    log.info("compiling the native CPU kernels with %s (once, some seconds)", compiler)
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            command = [compiler, *_flags(), *sources, "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
            if done.returncode:
                raise NativeBuildError(f"{compiler} failed:\n{done.stderr[-2000:]}")
            built.replace(library)  # all or nothing, whoever else builds at this moment
    except (OSError, subprocess.TimeoutExpired) as e:
        raise NativeBuildError(f"cannot build {library}: {e}") from e
