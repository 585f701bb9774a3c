"""A `macaw serve` of the benchmark's own, in processes of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import IO

from macaw_server.bench.errors import BenchError

STOP_TIMEOUT_S = 60.0


@contextmanager
def started(model: str, dtype: str, flags: Sequence[str]) -> Iterator[str]:
    """Serve `model` on a free port until the block ends; yields the URL.

    Raises:
        BenchError: The server did not start; with its last words.
    """
    command = [sys.executable, "-m", "macaw_server", "serve", model, "--port", "0", "--dtype", dtype, *flags]
    words: SimpleQueue[str] = SimpleQueue()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        # It is read to the end, so that the server never waits for a reader.
        reader = threading.Thread(target=_read, args=(process.stderr, words))
        reader.start()
        try:
            lines: list[str] = []
            while not (found := re.search(r"serving at (http://\S+)/v1", line := words.get())):
                if not line:
                    raise BenchError("macaw serve did not start:\n" + "".join(lines[-10:]))
                lines.append(line)
            yield found[1]
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
            reader.join()


def _read(stream: IO[str], words: SimpleQueue[str]) -> None:
    """Every line, and an empty one at the end."""
    for line in stream:
        words.put(line)
    words.put("")
