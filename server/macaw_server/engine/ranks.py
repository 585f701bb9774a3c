"""The processes of one engine: rank 0 works for the server, the others run its steps along on their shards.

All are children of the server, and each has a pipe to it: each sees the server's end, and the server sees theirs.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from macaw_server.config import EngineConfig

_context = multiprocessing.get_context("spawn")


class Seat(NamedTuple):
    """A rank's place among the others.

    Attributes:
        rank: Its number.
        links: Of rank 0: a pipe to each of the others, in order. Of another: one to rank 0.
    """

    rank: int
    links: tuple[Connection, ...]

    def smallest(self, own: tuple[int, ...]) -> tuple[int, ...]:
        """The smallest of what all ranks call this with."""
        if self.rank > 0:
            (leader,) = self.links
            leader.send(own)
            answer: tuple[int, ...] = leader.recv()
            return answer
        answer = min([own, *(link.recv() for link in self.links)])
        for link in self.links:
            link.send(answer)
        return answer


class Member(NamedTuple):
    """A rank as the server sees it."""

    process: BaseProcess
    pipe: Connection


class Ranks:
    """The running processes of one engine.

    Args:
        main: Main function of each: gets `config`, the other end of a pipe to the server, and its seat.
        config: Says how many there are.

    Attributes:
        members: By rank.
    """

    def __init__(self, main: Callable[[EngineConfig, Connection, Seat], None], config: EngineConfig) -> None:
        pairs = [_context.Pipe() for _ in range(1, config.tensor_parallel_size)]
        seats = [Seat(0, tuple(ours for ours, _ in pairs))]
        seats += [Seat(rank, (theirs,)) for rank, (_, theirs) in enumerate(pairs, start=1)]
        self.members = [_start(main, config, seat) for seat in seats]

    @property
    def leader(self) -> Member:
        """Rank 0, which takes the requests."""
        return self.members[0]

    def join(self, timeout_s: float) -> None:
        """Wait until all have ended, but no longer than this."""
        deadline_s = time.monotonic() + timeout_s
        for process, _ in self.members:
            process.join(max(0.0, deadline_s - time.monotonic()))

    def kill(self) -> None:
        """End those that have not ended, and wait for it: what they hold of a device is free then."""
        for process, _ in self.members:
            process.kill()
        for process, _ in self.members:
            process.join()


def _start(main: Callable[[EngineConfig, Connection, Seat], None], config: EngineConfig, seat: Seat) -> Member:
    ours, theirs = _context.Pipe()
    name = f"macaw-engine-{seat.rank}" if seat.rank else "macaw-engine"
    process = _context.Process(target=main, args=(config, theirs, seat), name=name, daemon=True)
    process.start()
    for pipe in (theirs, *seat.links):  # only the process holds them now, so that they end when it does
        pipe.close()
    return Member(process, ours)
