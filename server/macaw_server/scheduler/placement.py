"""Which of several engines runs a call: where it is done soon, at little cost to others. Pure.

An engine is done with a call's prompt after the work that it has taken on, and the part of the prompt that its cache
does not hold (as in Preble: Srivatsa et al., ICLR 2025). That part counts twice, since others wait for it too.
So a call goes where its prefix is, unless it would wait there for longer than the prefix saves, to it and to others.

Task groups need no rule of their own: each member that is placed adds to its engine's work, so a group stays together
as long as its shared prefix costs more to compute again than the members that are there, and spreads when it costs
less. A consumer finds its producer's pages like any other prefix.

A placement is a guess of how long things take. So when nobody waits at an engine any more, calls that wait at the one
with the most work are looked at again, the last ones first, and move if that pays.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Literal, NamedTuple

from macaw_server.engine.types import EngineRequest
from macaw_server.scheduler.placer import LeastLoaded, Move, Placer
from macaw_server.scheduler.step_time import Coefficients, StepTimeModel

BLOCK_SIZE = 64
"""Tokens of a prefix that are told apart: finer finds more, and costs more."""


class PrefixIndex:
    """What each engine's cache is likely to hold: what was sent there, least recently used out first.

    Only hashes of blocks are kept, each with that of the block before, so memory does not depend on the length of
    prompts, and a block is found only behind the same text. Whoever is found for a block is found for all before it.

    Args:
        num_engines: Numbered from 0.
        capacity_tokens: Of one engine's cache; 0 where nothing is kept.
        block_size: Tokens of a block.
    """

    def __init__(self, num_engines: int, capacity_tokens: int, block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        self._capacity = capacity_tokens // block_size
        self._holders: dict[int, set[int]] = {}
        self._blocks: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_engines)]

    def hashes(self, token_ids: Seq[int], salt: str) -> list[int]:
        """Of each full block, everything before it included; none where none can be held."""
        if not self._capacity:
            return []
        size, chained, hashes = self.block_size, hash(salt), []
        for start in range(0, len(token_ids) - size + 1, size):
            chained = hash((chained, *token_ids[start : start + size]))
            hashes.append(chained)
        return hashes

    def holders(self, hashes: Seq[int]) -> Iterator[tuple[int, set[int]]]:
        """Numbers of blocks, most first, and the engines that hold so many of these and no more."""
        seen: set[int] = set()
        for num_blocks in range(len(hashes), 0, -1):
            holders = self._holders.get(hashes[num_blocks - 1])
            if holders is not None and len(holders) > len(seen):
                yield num_blocks, holders - seen
                seen |= holders

    def insert(self, hashes: Seq[int], engine: int) -> None:
        """Note that an engine holds a prefix, as of now."""
        blocks = self._blocks[engine]
        for chained in reversed(hashes):  # the front last: it is the last to go
            if chained in blocks:
                blocks.move_to_end(chained)
            else:
                blocks[chained] = None
                self._holders.setdefault(chained, set()).add(engine)
        while len(blocks) > self._capacity:
            self._forget(blocks.popitem(last=False)[0], engine)

    def clear(self, engine: int) -> None:
        """Note that an engine holds nothing."""
        for chained in self._blocks[engine]:
            self._forget(chained, engine)
        self._blocks[engine].clear()

    def _forget(self, chained: int, engine: int) -> None:
        holders = self._holders[chained]
        holders.remove(engine)
        if not holders:
            del self._holders[chained]


class _Placed(NamedTuple):
    """A request that an engine has taken on."""

    engine: int
    prefill_ms: float
    decode_ms: float
    hashes: list[int]
    num_tokens: int

    @property
    def work_ms(self) -> float:
        return self.prefill_ms + self.decode_ms


MAX_PLACED_AGAIN = 8
"""Calls that are looked at when an engine runs out of calls that wait."""
COST_OF_RECOMPUTING = 4.0
"""How often what is computed again counts: twice as when placing, and what comes behind the call would be there too."""
MIN_GAIN_MS = 10.0
"""What a move has to save, on top of what is computed again: it takes a message to each of two processes."""


class Placement(Placer):
    """By cached prefix and work left, in milliseconds.

    Args:
        num_engines: At least 1.
        capacity_tokens: Of one engine's KV cache; 0 where that keeps nothing.
        step_time: What work costs; may go on learning.
        block_size: See `PrefixIndex`.
    """

    def __init__(
        self, num_engines: int, capacity_tokens: int, step_time: StepTimeModel, *, block_size: int = BLOCK_SIZE
    ) -> None:
        if num_engines < 1:
            raise ValueError(f"{num_engines} engines cannot run a call; it takes at least 1.")
        self._index = PrefixIndex(num_engines, capacity_tokens, block_size)
        self._step_time = step_time
        self._work_ms = [0.0] * num_engines
        self._alive = set(range(num_engines))
        self._placed: dict[str, _Placed] = {}
        self._waiting: list[dict[str, None]] = [{} for _ in range(num_engines)]  # in the order of placing
        self._busy: set[int] = set()  # engines where somebody waits
        self._mean_output = 64.0

    @property
    def work_ms(self) -> list[float]:
        """Estimated work that each engine has taken on and not done."""
        return list(self._work_ms)

    def place(self, request: EngineRequest) -> int:
        """Where it is done soonest, what it computes counted twice."""
        if not self._alive:
            raise RuntimeError("No engine is alive; restore one before placing requests.")
        hashes, num_tokens = self._index.hashes(request.prompt_ids, request.salt), len(request.prompt_ids)
        num_tokens += len(request.output_ids)
        _, prefill_ms, engine = min(self._options(hashes, num_tokens))
        costs = self._step_time.coefficients
        num_outputs = min(request.sampling.max_tokens, self._mean_output)
        decode_ms = num_outputs * (costs.token + costs.sample + (costs.kv_token + costs.score) * num_tokens)
        self._put(request.request_id, _Placed(engine, prefill_ms, decode_ms, hashes, num_tokens))
        if not request.prefill_only:
            self._wait(request.request_id, engine)
        return engine

    def moves(self, target: int) -> list[Move]:
        """Takes the time of placing `MAX_PLACED_AGAIN` calls; none where somebody waits there, or nobody elsewhere."""
        if self._waiting[target] or not self._busy or target not in self._alive:
            return []
        source = max(self._busy, key=lambda engine: (self._work_ms[engine], engine))
        moves = []
        staying: set[int] = set()  # first blocks
        for request_id in list(itertools.islice(reversed(self._waiting[source]), MAX_PLACED_AGAIN)):
            placed = self._placed[request_id]
            if not staying.isdisjoint(placed.hashes[:1]):
                continue  # it may be the one that computes a prefix for those that stay
            holders = self._index.holders(placed.hashes)
            num_blocks = next((num_blocks for num_blocks, engines in holders if target in engines), 0)
            prefill_ms = self._prefill_ms(num_blocks, placed.num_tokens)
            sooner_ms = self._work_ms[source] - placed.work_ms - self._work_ms[target]
            if sooner_ms > MIN_GAIN_MS + COST_OF_RECOMPUTING * max(0.0, prefill_ms - placed.prefill_ms):
                self._work_ms[source] -= placed.work_ms
                self._wait_no_more(request_id, source)
                self._put(request_id, placed._replace(engine=target, prefill_ms=prefill_ms))
                self._wait(request_id, target)
                moves.append(Move(request_id, source, target))
            else:
                staying.update(placed.hashes[:1])
        return moves

    def admitted(self, request_id: str) -> None:
        """It waits no more."""
        if (placed := self._placed.get(request_id)) is not None:
            self._wait_no_more(request_id, placed.engine)

    def started(self, request_id: str) -> None:
        """Its prefill is done."""
        if (placed := self._placed.get(request_id)) is not None:
            self._work_ms[placed.engine] -= placed.prefill_ms
            self._placed[request_id] = placed._replace(prefill_ms=0.0)

    def ended(self, request: EngineRequest, output_ids: Seq[int]) -> None:
        """Its work is done, and its prefix is there."""
        placed = self._placed.pop(request.request_id, None)
        if placed is None:
            return
        self._wait_no_more(request.request_id, placed.engine)
        self._work_ms[placed.engine] -= placed.work_ms
        self._mean_output += (len(output_ids) - self._mean_output) / 64
        self._index.insert(self._index.hashes([*request.prompt_ids, *output_ids], request.salt), placed.engine)

    def lose(self, engine: int) -> list[str]:
        """Its work and its prefixes are nowhere."""
        self._alive.discard(engine)
        self._index.clear(engine)
        self._work_ms[engine] = 0.0
        self._waiting[engine].clear()
        self._busy.discard(engine)
        lost = [request_id for request_id, placed in self._placed.items() if placed.engine == engine]
        for request_id in lost:
            del self._placed[request_id]
        return lost

    def restore(self, engine: int) -> None:
        """It takes part again."""
        self._alive.add(engine)

    def _options(self, hashes: Seq[int], num_tokens: int) -> Iterator[tuple[float, float, int]]:
        """The best engine for each length of the prefix that engines hold: when it is done, prefill time, engine."""
        num_left = len(self._alive)
        for num_blocks, engines in (*self._index.holders(hashes), (0, self._alive)):
            if num_left == 0:
                return
            num_left -= len(engines)
            engine = min(engines, key=self._work_ms.__getitem__)
            prefill_ms = self._prefill_ms(num_blocks, num_tokens)
            yield self._work_ms[engine] + 2 * prefill_ms, prefill_ms, engine

    def _prefill_ms(self, num_blocks: int, num_tokens: int) -> float:
        return _prefill_ms(self._step_time.coefficients, num_blocks * self._index.block_size, num_tokens)

    def _wait(self, request_id: str, engine: int) -> None:
        self._waiting[engine][request_id] = None
        self._busy.add(engine)

    def _wait_no_more(self, request_id: str, engine: int) -> None:
        self._waiting[engine].pop(request_id, None)
        if not self._waiting[engine]:
            self._busy.discard(engine)

    def _put(self, request_id: str, placed: _Placed) -> None:
        self._placed[request_id] = placed
        self._work_ms[placed.engine] += placed.work_ms
        self._index.insert(placed.hashes, placed.engine)


PlacementName = Literal["affinity", "least-loaded"]


def make_placer(
    name: PlacementName,
    num_engines: int,
    capacity_tokens: int,
    step_time: StepTimeModel,
    *,
    prefix_caching: bool = True,
) -> Placer:
    """The strategy of that name; see `Placement` for the other arguments."""
    if name == "least-loaded":
        return LeastLoaded(num_engines)
    return Placement(num_engines, capacity_tokens if prefix_caching else 0, step_time)


def _prefill_ms(costs: Coefficients, start: int, end: int) -> float:
    """Marginal time of computing the tokens ``[start, end)`` of a sequence; one at least is computed."""
    start = min(start, end - 1)
    pairs = (end * (end + 1) - start * (start + 1)) / 2
    return (costs.token + costs.beyond) * (end - start) + costs.score * pairs
