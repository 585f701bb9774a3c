"""The engine's main loop: take messages in, step while there is work, send outputs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from macaw_server.engine.types import EngineInfo, EngineOutput, EngineRequest, EngineStats

if TYPE_CHECKING:  # the HTTP side speaks these messages too, and has no use for torch
    from macaw_server.engine.core import EngineCore

log = logging.getLogger(__name__)


class Add(NamedTuple):
    """Queue a request."""

    request: EngineRequest


class Abort(NamedTuple):
    """Forget requests, and what only they have computed too unless `keep_pages`."""

    request_ids: list[str]
    keep_pages: bool


class Withdraw(NamedTuple):
    """Forget a request that another engine runs; what it has computed stays. Answered by `Withdrawn`."""

    request_id: str


class LetGo(NamedTuple):
    """Keep nothing for these programs and requests any more."""

    holders: list[str]


class GetStats(NamedTuple):
    """Ask for a `Stats` message."""


class Stop(NamedTuple):
    """Leave the loop."""


class Loading(NamedTuple):
    """What the engine is busy with before it is ready."""

    step: str


class Ready(NamedTuple):
    """The model is loaded and requests are worked on."""

    info: EngineInfo


class LoadFailed(NamedTuple):
    """The model cannot be served."""

    error: Exception


class Outputs(NamedTuple):
    """What one step did."""

    outputs: list[EngineOutput]


class Stats(NamedTuple):
    """The counters now."""

    stats: EngineStats


class Withdrawn(NamedTuple):
    """A request is forgotten: outputs of it that come later are those of its next `Add`."""

    request_id: str


Inbound = Add | Abort | Withdraw | LetGo | GetStats | Stop
Outbound = Loading | Ready | LoadFailed | Outputs | Stats | Withdrawn


def run_loop(core: EngineCore, inbox: SimpleQueue[Inbound], send: Callable[[Outbound], None]) -> None:
    """Work until a `Stop` arrives; blocks while there is nothing to do."""
    while True:
        for message in _drain(inbox, core.hold_s() if core.has_work else None):
            match message:
                case Add(request):
                    refused = core.add(request)
                    if refused is not None:
                        send(Outputs([refused]))
                case Abort(request_ids, keep_pages):
                    core.abort(request_ids, keep_pages=keep_pages)
                case Withdraw(request_id):
                    core.abort([request_id], keep_pages=True)
                    send(Withdrawn(request_id))
                case LetGo(holders):
                    core.let_go(holders)
                case GetStats():
                    send(Stats(core.stats()))
                case Stop():
                    return
        if core.has_work and not core.hold_s():
            outputs = core.step()
            if outputs:
                send(Outputs(outputs))


def _drain(inbox: SimpleQueue[Inbound], wait_s: float | None) -> list[Inbound]:
    """All messages that are there; the first is waited for, without a limit where that is None."""
    messages: list[Inbound] = []
    try:
        if wait_s != 0:
            messages.append(inbox.get(timeout=wait_s))
        while True:
            messages.append(inbox.get_nowait())
    except Empty:
        return messages
