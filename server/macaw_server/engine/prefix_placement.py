"""Which of several engines runs a request: the one with the least work before it, counted in tokens. Pure.

A cached prefix is work that is not there, so a request goes where its prefix is, unless what waits there costs more:
what is computed a second time counts twice, for it delays others as long as it takes. A
group with a long shared prefix stays together until the engine has more to do than the prefix is worth, and one with a
short prefix spreads at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from macaw_server.engine.types import EngineRequest

DECODE_COST = 4.0
"""An output token in tokens of prefill: less than in a batch of one, for others share its step."""
RECOMPUTE_COST = 2.0
"""See above."""
MAX_COUNTED_OUTPUT = 256
"""Few answers are as long as they may be."""


class _Placed(NamedTuple):
    engine: int
    prefill: float
    decode: float


class PrefixPlacement:
    """See the module. What an engine has cached is guessed from what was sent there, least recently used out first.

    Args:
        num_engines: Numbered from 0, all alive.
        page_size: Tokens that are found together.
        capacity_pages: Of one engine's cache.
    """

    def __init__(self, num_engines: int, page_size: int, capacity_pages: int) -> None:
        self._page_size = page_size
        self._capacity = capacity_pages
        self._pages: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_engines)]
        self._work = [0.0] * num_engines
        self._alive = set(range(num_engines))
        self._placed: dict[str, _Placed] = {}

    def place(self, request: EngineRequest) -> int:
        """The engine with the least work before it and in it."""
        if not self._alive:
            raise RuntimeError("No engine is alive; restore one before placing requests.")
        tokens = request.prompt_ids + request.output_ids
        hashes = self._hashes(tokens, request.salt)
        prefill = {i: max(1, len(tokens) - self._num_cached(i, hashes)) for i in self._alive}
        engine = min(sorted(self._alive), key=lambda i: self._work[i] + RECOMPUTE_COST * prefill[i])
        left = min(MAX_COUNTED_OUTPUT, request.sampling.max_tokens - len(request.output_ids))
        placed = self._placed[request.request_id] = _Placed(engine, prefill[engine], DECODE_COST * left)
        self._work[engine] += placed.prefill + placed.decode
        self._insert(engine, hashes)
        return engine

    def started(self, request_id: str) -> None:
        """The request's prompt is computed."""
        if (placed := self._placed.get(request_id)) is not None:
            self._work[placed.engine] -= placed.prefill
            self._placed[request_id] = placed._replace(prefill=0.0)

    def ended(self, request: EngineRequest, output_ids: Sequence[int]) -> None:
        """The request has ended; what it has computed may be found."""
        if (placed := self._placed.pop(request.request_id, None)) is not None:
            self._work[placed.engine] -= placed.prefill + placed.decode
            self._insert(placed.engine, self._hashes([*request.prompt_ids, *output_ids], request.salt))

    def lose(self, engine: int) -> list[str]:
        """The engine is gone, its cache too; returns the requests it had."""
        self._alive.discard(engine)
        self._pages[engine].clear()
        self._work[engine] = 0.0
        lost = [request_id for request_id, placed in self._placed.items() if placed.engine == engine]
        for request_id in lost:
            del self._placed[request_id]
        return lost

    def restore(self, engine: int) -> None:
        """The engine is there again, with an empty cache."""
        self._alive.add(engine)

    def _hashes(self, tokens: Sequence[int], salt: str) -> list[int]:
        """Of each full page, everything before it included."""
        size, chained, hashes = self._page_size, hash(salt), []
        for start in range(0, len(tokens) - size + 1, size):
            chained = hash((chained, *tokens[start : start + size]))
            hashes.append(chained)
        return hashes

    def _num_cached(self, engine: int, hashes: list[int]) -> int:
        pages = self._pages[engine]
        return self._page_size * next((i for i, page in enumerate(hashes) if page not in pages), len(hashes))

    def _insert(self, engine: int, hashes: list[int]) -> None:
        pages = self._pages[engine]
        for page in reversed(hashes):  # the front last: it is the last to go
            pages[page] = None
            pages.move_to_end(page)
        while len(pages) > self._capacity:
            pages.popitem(last=False)
