"""What is compared: plain requests, programs, and programs with one of Macaw's mechanisms switched off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from macaw_server.bench.errors import BenchError
from macaw_server.bench.workload.clients import Way


class Side(NamedTuple):
    """One way of running a workload.

    Attributes:
        name: For tables.
        way: How applications are sent.
        flags: Of its `macaw serve`, on top of the ones for all.
        url: Of a server that runs already; None is started.
    """

    name: str
    way: Way
    flags: tuple[str, ...] = ()
    url: str | None = None


BASELINE = Side("requests", "requests", ("--policy", "fcfs", "--eviction", "lru"))
"""What a user has today: each call a request, first come first served, continuous batching, an LRU prefix cache."""
MACAW = Side("macaw", "programs")

SWITCHES: dict[str, Side] = {
    "programs": Side("without programs", "requests"),
    "policy": Side("without policy app", "programs", ("--policy", "fcfs")),
    "two-phase": Side("without two-phase", "programs", ("--sharing", "never")),
    "prefill-ahead": Side("without prefill ahead", "programs", ("--no-prefill-ahead",)),
    "pipelining": Side("without pipelining", "programs", ("--no-pipelining",)),
}
"""Each of Macaw's mechanisms by name, and the side that lacks it alone."""


def choose_sides(ablate: Sequence[str], peer: str | None) -> list[Side]:
    """Baseline, Macaw, a peer, and Macaw without each of `ablate`; ``all`` is all of them.

    Raises:
        BenchError: There is no such switch.
    """
    names = list(SWITCHES) if list(ablate) == ["all"] else list(ablate)
    if unknown := [name for name in names if name not in SWITCHES]:
        raise BenchError(f"--ablate {','.join(unknown)} was given; {', '.join(SWITCHES)} or all are accepted.")
    others = [] if peer is None else [Side("peer", "requests", url=peer.rstrip("/").removesuffix("/v1"))]
    return [BASELINE, *others, MACAW, *(SWITCHES[name] for name in names)]
