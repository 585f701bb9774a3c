"""What is compared: plain requests, programs, and programs with one of Macaw's mechanisms switched off."""

from __future__ import annotations

import itertools
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
        switch: The mechanism that it lacks, by name; None is no ablation.
    """

    name: str
    way: Way
    flags: tuple[str, ...] = ()
    url: str | None = None
    switch: str | None = None


BASELINE = Side("requests", "requests", ("--policy", "fcfs", "--eviction", "lru"))
"""What a user has today: each call a request, first come first served, continuous batching, an LRU prefix cache."""
BASELINES: dict[str, Side] = {
    "requests": BASELINE,
    "uncached": Side("uncached requests", "requests", (*BASELINE.flags, "--no-prefix-caching")),
}
"""By name; ``uncached`` is what Parrot was measured against: a server that computes every prompt as a whole."""
MACAW = Side("macaw", "programs")


def _without(switch: str, *flags: str, way: Way = "programs") -> Side:
    return Side(f"without {switch}", way, flags, switch=switch)


_SWITCHES = (
    _without("programs", way="requests"),
    _without("prefix-caching", "--no-prefix-caching"),
    _without("two-phase", "--sharing", "never"),
    _without("single-flight", "--no-single-flight"),
    _without("policy", "--policy", "fcfs"),
    _without("task-groups", "--no-task-groups"),
    _without("prefill-ahead", "--no-prefill-ahead"),
    _without("pipelining", "--no-pipelining"),
    _without("placement", "--placement", "least-loaded"),
    _without("eviction", "--eviction", "lru"),
)
SWITCHES: dict[str, Side] = {str(side.switch): side for side in _SWITCHES}
"""Each of Macaw's mechanisms by name, and the side that lacks it alone."""
_ONE_ENGINE = "placement means something with several engines only; give -- --engines 2"


def choose_sides(
    ablate: Sequence[str], peer: str | None, baselines: Sequence[str] = ("requests",), serve_flags: Sequence[str] = ()
) -> list[Side]:
    """Baselines, a peer, Macaw, and Macaw without each of `ablate`; ``all`` is all that mean something.

    Raises:
        BenchError: There is no such switch or baseline, or it means nothing with these flags of `macaw serve`.
    """
    names = list(SWITCHES) if list(ablate) == ["all"] else list(dict.fromkeys(ablate))
    if unknown := [name for name in names if name not in SWITCHES]:
        raise BenchError(f"--ablate {','.join(unknown)} was given; {', '.join(SWITCHES)} or all are accepted.")
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise BenchError(f"--baseline {','.join(unknown)} was given; {', '.join(BASELINES)} are accepted.")
    if "placement" in names and not _several_engines(serve_flags):
        if list(ablate) != ["all"]:
            raise BenchError(f"--ablate placement was given: {_ONE_ENGINE}.")
        names.remove("placement")
    first = [BASELINES[name] for name in dict.fromkeys(baselines)]
    others = [] if peer is None else [Side("peer", "requests", url=peer.rstrip("/").removesuffix("/v1"))]
    return [*first, *others, MACAW, *(SWITCHES[name] for name in names)]


def left_out(ablate: Sequence[str], serve_flags: Sequence[str]) -> str | None:
    """What `choose_sides` leaves out of ``all``, and why."""
    return _ONE_ENGINE if list(ablate) == ["all"] and not _several_engines(serve_flags) else None


def _several_engines(serve_flags: Sequence[str]) -> bool:
    words = [part for flag in serve_flags for part in flag.split("=", 1)]
    return any(pair[0] == "--engines" and pair[1] != "1" for pair in itertools.pairwise(words))
