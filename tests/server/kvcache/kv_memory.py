"""What is really in the pages: a model of the KV memory that finds every wrong read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from macaw_server.kvcache import KVCache
from macaw_server.kvcache.radix_tree import PUBLIC


def prefix_hashes(salt: str | None, tokens: Iterable[int], num_public: int = 0) -> list[int]:
    """For each position a number that stands for the salt and all tokens up to there; of the first ones without it."""
    state, hashes = hash(("root", PUBLIC if num_public else salt)), []
    for i, token in enumerate(tokens):
        if num_public and i == num_public:
            state = hash((state, "salt", salt))
        state = hash((state, token))
        hashes.append(state)
    return hashes


class KVMemory:
    """Slots of all pages; each holds the hash of the prefix that was computed into it."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.slots: dict[int, int] = {}

    def _slot(self, block_table: list[int], position: int) -> int:
        size = self.cache.page_size
        return block_table[position // size] * size + position % size

    def write(self, block_table: list[int], hashes: list[int], start: int, stop: int) -> None:
        for position in range(start, stop):
            self.slots[self._slot(block_table, position)] = hashes[position]

    def check(self, block_table: list[int], hashes: list[int], stop: int) -> None:
        """Assert that the first `stop` positions hold what they should."""
        for position in range(stop):
            found = self.slots.get(self._slot(block_table, position))
            assert found == hashes[position], f"position {position} of {stop} has other content"

    def prefixes(self) -> dict[int, int]:
        """Page by prefix hash, for all pages in the tree, pending or ready."""
        return {end: page for _, end, page in self._walk()}

    def ready_prefixes(self) -> dict[int, int]:
        """The same for ready pages; asserts that each holds what the tree says."""
        size, found = self.cache.page_size, {}
        for ready, end, page in self._walk():
            if ready:
                assert self.slots[page * size + size - 1] == end, f"page {page} has other content"
                assert end not in found, "the tree holds a prefix twice"
                found[end] = page
        return found

    def _walk(self) -> Iterator[tuple[bool, int, int]]:
        """Whether it is ready, hash at its end, and number, of each page in the tree."""
        size = self.cache.page_size
        for node in self.cache.tree.nodes():
            path = list(self.cache.tree.path(node))[::-1]
            num_public = sum(len(part.tokens) for part in path if part.salt is PUBLIC)
            hashes = prefix_hashes(node.salt, [token for part in path for token in part.tokens], num_public)
            ends = hashes[size - 1 :: size][-len(node.pages) :] if node.pages else []
            for i, (end, page) in enumerate(zip(ends, node.pages, strict=True)):
                yield i < node.num_ready, end, page
