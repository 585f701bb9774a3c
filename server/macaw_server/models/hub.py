"""Models on the hub: whether it can be reached, and what is cached where it cannot.

The hub library tries again and again for about a minute before it says that there is no network; one short try first
says so in seconds, and a model that was downloaded before needs no network at all.
"""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue

import httpx

from macaw_server.errors import ModelLoadError

TIMEOUT_S = 10.0
"""For the connection to be there, name resolution included; as long as the hub library waits for one answer."""


def snapshot(name: str, revision: str | None) -> Path | None:
    """Where a model is cached that can only come from there; None if the hub answers, and can be asked.

    Args:
        name: On the hub, such as ``org/model``.
        revision: Branch, tag or commit; None is the main branch.

    Raises:
        ModelLoadError: The hub cannot be reached, and the model is not cached.
    """
    from huggingface_hub import constants, snapshot_download

    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    if reason is None:
        return None
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError) as e:  # not there, or no name of the hub
        of = f" (revision {revision})" if revision else ""
        raise ModelLoadError(
            f"No folder {name}, the hub at {constants.ENDPOINT} cannot be reached ({reason}), and {name}{of} is "
            f"not in its cache, {constants.HF_HUB_CACHE}. Give a model folder, or connect this machine to the hub."
        ) from e


@cache
def unreachable(endpoint: str) -> str | None:
    """Why nobody answers there, or None: any answer will do, and a slow one is the hub library's to wait for."""
    answer: SimpleQueue[str | None] = SimpleQueue()

    def ask() -> None:
        try:
            httpx.head(endpoint, timeout=httpx.Timeout(TIMEOUT_S))
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as e:
            answer.put(str(e) or type(e).__name__)
        except httpx.HTTPError:
            answer.put(None)
        else:
            answer.put(None)

    # A thread, for the resolver knows no timeout.
    threading.Thread(target=ask, name="macaw-hub-probe", daemon=True).start()
    try:
        return answer.get(timeout=TIMEOUT_S)
    except Empty:
        return f"no connection within {TIMEOUT_S:g} s"
