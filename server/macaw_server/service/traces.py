"""Recordings of what runs: each call that has ended as lengths, times and numbers of blocks, for those who listen."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Literal, NamedTuple

from macaw.errors import OverloadedError
from macaw.protocol import Hints, TracedCall, TraceLost, TraceStarted
from macaw_server.programs.calls import CallNode
from macaw_server.programs.program import Program
from macaw_server.service.types import Tenant

MAX_RECORDINGS = 4
"""Of one tenant at once."""
MAX_KEPT = 250_000
"""Numbers of blocks that wait for one slow reader; a call counts as `_CALL_COST` more."""
_CALL_COST = 64
_NUMBER_BITS = 53
"""What every reader of JSON takes for a whole number."""
_APP_LABELS = ("app", "chain", "engine")
"""Of a program's metadata, where adapters say what runs."""


class BlockChain:
    """Numbers of a text's blocks, from the front: each is a keyed hash of the block's tokens and the number before it.

    Args:
        key: Nobody who has the numbers may have it, or could try texts on them.
        block_size: Tokens.
    """

    __slots__ = ("_block_size", "_key", "_rest", "_state")

    def __init__(self, key: bytes, block_size: int) -> None:
        self._key, self._block_size = key, block_size
        self._state = b""
        self._rest: array[int] = array("I")

    def add(self, token_ids: Sequence[int]) -> list[int]:
        """Numbers of the blocks that these tokens fill."""
        tokens = self._rest + array("I", token_ids)
        end = len(tokens) // self._block_size * self._block_size
        numbers = []
        for i in range(0, end, self._block_size):
            self._state = self._hash(tokens[i : i + self._block_size])
            numbers.append(_number(self._state))
        self._rest = tokens[end:]
        return numbers

    def unfilled(self) -> list[int]:
        """Number of the last block, if it is not full."""
        return [_number(self._hash(self._rest))] if self._rest else []

    def _hash(self, tokens: array[int]) -> bytes:
        return hashlib.blake2b(self._state + tokens.tobytes(), digest_size=16, key=self._key).digest()


def _number(state: bytes) -> int:
    return int.from_bytes(state[:8], "big") >> (64 - _NUMBER_BITS)


class Recording:
    """What one reader gets.

    Args:
        tenant: Whose calls.
        block_size: Tokens of a block.
        epoch_s: Monotonic seconds from which all times count.
    """

    def __init__(self, tenant: Tenant, block_size: int, epoch_s: float) -> None:
        self.tenant = tenant
        self.block_size = block_size
        self.epoch_s = epoch_s
        self._key = secrets.token_bytes(32)
        self._waiting: deque[TracedCall] = deque()
        self._num_kept = 0
        self._num_lost = 0
        self._changed = asyncio.Event()
        self._closed = False

    async def events(self) -> AsyncIterator[TraceStarted | TracedCall | TraceLost]:
        """Everything as it comes, until the server ends."""
        tenant = hashlib.sha256(self.tenant.id.encode()).hexdigest()[:16]
        yield TraceStarted(tenant=tenant, block_size=self.block_size, now_ms=1000 * (time.monotonic() - self.epoch_s))
        while True:
            while self._waiting:
                call = self._waiting.popleft()
                self._num_kept -= _cost(call)
                yield call
            if self._num_lost:
                lost, self._num_lost = self._num_lost, 0
                yield TraceLost(num_calls=lost)
            elif self._closed:
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    def chain(self) -> BlockChain:
        """For the blocks of one call."""
        return BlockChain(self._key, self.block_size)

    def add(self, call: TracedCall) -> None:
        """A call has ended. What the reader does not take is lost, and counted."""
        if self._num_kept + _cost(call) > MAX_KEPT:
            self._num_lost += 1
        else:
            self._waiting.append(call)
            self._num_kept += _cost(call)
        self._changed.set()

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        self._changed.set()


def _cost(call: TracedCall) -> int:
    return _CALL_COST + len(call.blocks) + len(call.answer)


class Traces:
    """The recordings of all tenants. While a tenant has none, its calls pay one look-up each."""

    def __init__(self) -> None:
        self._epoch_s = time.monotonic()
        self._recordings: dict[str, tuple[Recording, ...]] = {}
        self._closed = False

    def of(self, tenant: Tenant) -> tuple[Recording, ...]:
        """Those that go on."""
        return self._recordings.get(tenant.id, ())

    def begin(self, tenant: Tenant, block_size: int) -> Recording:
        """Record the calls of a tenant that start from now on; `end` must follow.

        Raises:
            OverloadedError: The tenant has too many already, or the server ends.
        """
        others = self.of(tenant)
        if self._closed:
            raise OverloadedError("The server is shutting down. Record when it is back.", status=503)
        if len(others) >= MAX_RECORDINGS:
            raise OverloadedError(
                f"{len(others)} recordings of this API key go on, and no more than {MAX_RECORDINGS} are accepted at "
                "once. End one first."
            )
        recording = Recording(tenant, block_size, self._epoch_s)
        self._recordings[tenant.id] = (*others, recording)
        return recording

    def end(self, recording: Recording) -> None:
        """Its reader has left."""
        left = tuple(other for other in self.of(recording.tenant) if other is not recording)
        if left:
            self._recordings[recording.tenant.id] = left
        else:
            del self._recordings[recording.tenant.id]

    def close(self) -> None:
        """End all, for good."""
        self._closed = True
        for recordings in self._recordings.values():
            for recording in recordings:
                recording.close()


class _Started(NamedTuple):
    """A running call in one recording."""

    recording: Recording
    chain: BlockChain
    blocks: list[int]


class RunTrace:
    """Tells the tenant's recordings of one program's calls.

    Args:
        traces: All recordings.
        program: The program.
        tenant: Whose it is.
        started_s: Monotonic seconds from which its times count.
        shown_id: Under which a client knows it.
        hints: Of a plain program.
    """

    __slots__ = ("_hints", "_program", "_shown_id", "_started", "_started_s", "_tenant", "_traces")

    def __init__(
        self, traces: Traces, program: Program, tenant: Tenant, started_s: float, shown_id: str, hints: Hints | None
    ) -> None:
        self._traces, self._program, self._tenant, self._started_s = traces, program, tenant, started_s
        self._shown_id, self._hints = shown_id, hints
        self._started: dict[str, list[_Started]] = {}

    def call_started(self, call_id: str, prompt_ids: Sequence[int]) -> None:
        """The engine took a call into a batch."""
        for recording in self._traces.of(self._tenant):
            chain = recording.chain()
            blocks = chain.add(prompt_ids)
            started = _Started(recording, chain, blocks + chain.unfilled())
            self._started.setdefault(call_id, []).append(started)

    def call_ended(self, call_id: str, choices: Sequence[Sequence[int]]) -> None:
        """A call has ended, with these tokens. One that began before a recording is in none."""
        if not self._started:
            return
        node = self._program.calls[call_id]
        for recording, chain, blocks in self._started.pop(call_id, ()):
            recording.add(self._traced(node, 1000 * (self._started_s - recording.epoch_s), choices, blocks, chain))

    def _traced(
        self, node: CallNode, arrival_ms: float, choices: Sequence[Sequence[int]], blocks: list[int], chain: BlockChain
    ) -> TracedCall:
        program, timings = self._program, node.timings
        assert timings.ready_ms is not None
        assert timings.completed_ms is not None
        deadlines = [target.deadline_ms for target in program.targets if target.deadline_ms is not None]
        return TracedCall(
            program=self._shown_id,
            kind=self._kind,
            node=node.call.id if self._kind == "program" else f"{program.id}/{node.call.id}",
            app=self._app,
            arrival_ms=arrival_ms,
            ready_ms=arrival_ms + timings.ready_ms,
            ended_ms=arrival_ms + timings.completed_ms,
            deps=program.feeders_of(node.call.id),
            prompt_tokens=node.prompt_tokens,
            cached_tokens=node.cached_tokens,
            output_tokens=[len(tokens) for tokens in choices],
            blocks=blocks,
            answer=chain.add(choices[0]),
            objective=_objective(program),
            deadline_ms=min(deadlines, default=None),
            error=None if node.error is None else node.error.code,
        )

    @property
    def _kind(self) -> Literal["program", "application", "request"]:
        if self._hints is None:
            return "program"
        return "request" if self._hints.app is None else "application"

    @property
    def _app(self) -> str | None:
        """What the client calls its application."""
        if self._hints is not None:
            return self._hints.app
        labels = self._program.request.metadata
        return next((labels[name] for name in _APP_LABELS if name in labels), None)


def _objective(program: Program) -> Literal["latency", "throughput"]:
    """The strictest of the targets; a program that has none yet is waited for."""
    objectives = {target.objective for target in program.targets}
    return "throughput" if objectives == {"throughput"} else "latency"
