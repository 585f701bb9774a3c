"""A thread for code that recurses deeply."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

STACK_BYTES = 256 * 2**20
"""Address space; memory is only taken where the stack is used."""
_lock = threading.Lock()


def deep_thread(name: str) -> ThreadPoolExecutor:
    """An executor of one thread with a large stack.

    A grammar of some thousand rules, each of which uses the next, makes llguidance recurse as deeply; on a stack of the
    usual size that ends the process.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    with _lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            executor.submit(threading.get_ident).result()  # starts the thread
        finally:
            threading.stack_size(before)
    return executor
