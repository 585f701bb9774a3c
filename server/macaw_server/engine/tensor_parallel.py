"""Several ranks run every step together, each with its shard of the weights and the K/V of its own heads.

Transformers shards the weights by the model's own plan (`models/sharding.py`), and its modules hold the collectives; so
ranks need no more than to run the same forward passes in the same order. Rank 0 schedules and samples. It tells the
others of each step through pipes and not by a collective: a pipe has no timeout while the engine idles, and ends when
the process at its other end does.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from macaw_server.config import EngineConfig
from macaw_server.engine.memory import PoolSize, choose_device
from macaw_server.engine.ranks import Seat
from macaw_server.engine.runner import Chunk
from macaw_server.errors import ConfigError

if TYPE_CHECKING:  # torch.distributed has it too, but not for mypy; a torch without ranks has none
    from torch._C._distributed_c10d import TCPStore

log = logging.getLogger(__name__)

_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
_TIMEOUT = timedelta(hours=2)
"""Of collectives. A rank that dies is seen by the end of its pipes; one that loads for long is just slow."""


class Runner(Protocol):
    """What computes a step; see `ModelRunner`."""

    def run(self, chunks: Seq[Chunk], token_ids: Tensor | None = None) -> Tensor:
        """The logits of the chunks' samples."""
        ...


class TensorParallel:
    """This process's part in an engine of several ranks.

    Args:
        config: The same for all ranks.
        seat: This one's place.

    Attributes:
        device: Where this rank's shard is.

    Raises:
        ConfigError: There is no device for this rank.
    """

    def __init__(self, config: EngineConfig, seat: Seat) -> None:
        self._seat = seat
        self.size = config.tensor_parallel_size
        self.device = rank_device(config, seat.rank)
        self._join()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self._seat.rank == 0

    def smallest(self, pool: PoolSize) -> PoolSize:
        """The smallest of all ranks' pools: a page is a page on every rank."""
        return PoolSize(*self._seat.smallest(pool))

    def lead(self, runner: Runner) -> Runner:
        """The runner of rank 0, whose steps all ranks run."""
        return LeadingRunner(runner, self._seat)

    def follow(self, runner: Runner) -> None:
        """Run rank 0's steps until it has left."""
        follow(runner, self._seat)

    def leave(self) -> None:
        """Tell the others that there are no more steps."""
        for link in self._seat.links:
            link.close()
        dist.destroy_process_group()

    def _join(self) -> None:
        """Meet the other ranks. All of them are on this machine, and nobody else is let in from outside of it."""
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, loopback)
        os.environ["LOCAL_RANK"] = str(self._seat.rank)  # transformers takes the device from there
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it makes its mesh of GPUs where it sees one
        dist.init_process_group(
            _BACKENDS[self.device.type],
            store=self._store(),
            rank=self._seat.rank,
            world_size=self.size,
            timeout=_TIMEOUT,
            device_id=self.device if self.device.type == "cuda" else None,
        )

    def _store(self) -> TCPStore:
        """Where ranks find each other: rank 0 serves it on a free port, which it tells the others."""
        from torch._C._distributed_c10d import TCPStore

        if not self.leads:
            (leader,) = self._seat.links
            return TCPStore("127.0.0.1", leader.recv(), self.size, timeout=_TIMEOUT)
        listener = socket.create_server(("127.0.0.1", 0))  # left to itself, the store listens on all addresses
        port = listener.getsockname()[1]
        store = TCPStore(
            "127.0.0.1",
            port,
            self.size,
            is_master=True,
            timeout=_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        for link in self._seat.links:
            link.send(port)
        return store


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank: GPUs are taken in order.

    Raises:
        ConfigError: A certain GPU was asked for, or there are fewer than ranks.
    """
    device = choose_device(config.device)
    if device.type == "cpu":
        return device
    size, num_gpus = config.tensor_parallel_size, torch.cuda.device_count()
    if config.device not in ("auto", "cuda"):
        raise ConfigError(
            f"--device {config.device} is one GPU, and --tensor-parallel-size {size} takes cuda:0 to cuda:{size - 1}. "
            "Use --device cuda; CUDA_VISIBLE_DEVICES chooses which GPUs that are."
        )
    if size > num_gpus:
        raise ConfigError(
            f"--tensor-parallel-size {size} is over the {num_gpus} GPUs that torch sees. Give at most {num_gpus}."
        )
    return torch.device("cuda", rank)


class LeadingRunner:
    """Runs a step here and, at the same time, on all other ranks.

    Args:
        runner: Of this rank.
        seat: Of rank 0.
    """

    def __init__(self, runner: Runner, seat: Seat) -> None:
        self._runner = runner
        self._links = seat.links

    def run(self, chunks: Seq[Chunk], token_ids: Tensor | None = None) -> Tensor:
        """See `ModelRunner`. An error ends this process."""
        assert token_ids is None, "no step of several ranks is launched ahead"
        with _to_the_end(0):
            step = pickle.dumps(chunks, protocol=pickle.HIGHEST_PROTOCOL)
            for link in self._links:
                link.send_bytes(step)
            return self._runner.run(chunks)


def follow(runner: Runner, seat: Seat) -> None:
    """Run rank 0's steps until it has left; an error in a step ends this process.

    Args:
        runner: Of this rank.
        seat: Of another rank than 0.
    """
    (leader,) = seat.links
    while True:
        try:
            step = leader.recv_bytes()
        except (EOFError, OSError):
            return
        with _to_the_end(seat.rank):
            runner.run(pickle.loads(step))


@contextmanager
def _to_the_end(rank: int) -> Iterator[None]:
    """A step that fails on one rank ends the engine: nobody knows where in it the others stand."""
    try:
        yield
    except Exception:
        log.exception("a step failed on rank %d; the engine has to start again", rank)
        os._exit(1)  # not by an exception: threads of the process group may keep an interpreter from its end
