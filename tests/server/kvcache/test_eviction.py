from __future__ import annotations

import pytest

from macaw_server.kvcache import KVCache, Node, RadixTree, Use
from macaw_server.kvcache.eviction import EvictionQueue, by_value, least_recently_used
from macaw_server.kvcache.retention import Retention

NUM_PAGES = 100
PLAIN = Use("request", True)
CALL = Use("program", False)


def cached(cache: KVCache, name: str, tokens: list[int], use: Use, salt: str = "") -> None:
    """Let a request compute these tokens and end."""
    pages = cache.admit(name, tokens, salt, use=use)
    assert hasattr(pages, "block_table")
    cache.mark_computed(pages, len(tokens) - pages.num_computed)
    cache.release(pages, tokens)


def order(cache: KVCache) -> list[int]:
    """First tokens of the prefixes in the order in which they go, one page each."""
    first_of = {node.pages[0]: node.tokens[0] for node in cache.tree.nodes() if node.pages}
    return [first_of[page] for page in cache.tree.evict(cache.num_pages)]


def test_by_value_what_nobody_needs_goes_first_and_declared_text_last() -> None:
    cache = KVCache(NUM_PAGES, 1, [[5]])
    cached(cache, "a", [5], CALL)  # declared
    cached(cache, "b", [4], CALL)
    cached(cache, "c", [3], CALL)
    cached(cache, "d", [3, 3], Use("other", False))  # hits 3
    cached(cache, "e", [2], PLAIN)
    cached(cache, "f", [1], CALL)
    cache.claim("program", [4], "", num_tokens=1, steps=0)
    assert order(cache)[-4:] == [2, 3, 4, 5]
    assert cache.tree.num_pages == 0, "whatever it is worth, it goes when there is nothing else"


def test_lru_knows_recency_alone() -> None:
    cache = KVCache(NUM_PAGES, 1, [[5]], eviction="lru")
    for i, token in enumerate((5, 3, 1)):
        cached(cache, f"r{i}", [token], CALL)
    assert order(cache) == [5, 3, 1]
    assert cache.retention is None


def test_the_nearest_step_stays_longest() -> None:
    cache = KVCache(NUM_PAGES, 1)
    for token, steps in ((1, 0), (2, 2), (3, 1)):
        cached(cache, f"r{token}", [token], CALL)
        cache.claim("program", [token], "", num_tokens=1, steps=steps)
    assert order(cache) == [2, 3, 1]


def test_nothing_stays_for_ever_by_what_was_known_of_it() -> None:
    cache = KVCache(4, 1)
    cached(cache, "old", [1], CALL)
    cache.claim("program", [1], "", num_tokens=1, steps=0)
    for i in range(12):  # several fills of four pages that nobody has a claim on
        cached(cache, f"new{i}", [10 + i], PLAIN)
    assert cache.tree.match_prefix([1], "", 9).pages == []


def test_calls_of_one_program_are_one_user() -> None:
    cache = KVCache(NUM_PAGES, 1)
    for i in range(2):
        cached(cache, f"r{i}", [1], CALL)
    cached(cache, "plain", [2], PLAIN)
    cached(cache, "call", [3], CALL)
    assert order(cache) == [1, 3, 2], "its own branches are private however many of its calls used them"


def test_a_hit_by_another_program_ends_privacy() -> None:
    cache = KVCache(NUM_PAGES, 1)
    cached(cache, "a", [1], CALL)
    cached(cache, "b", [2], CALL)
    cached(cache, "c", [1, 9], Use("other", False))
    assert order(cache) == [2, 9, 1]


def leaf(value: float) -> Node:
    return Node("", Node(""), [1], [1], 1, last_access=int(value))


class TestQueue:
    def test_a_value_that_falls_is_seen_at_once_and_one_that_rises_when_it_comes_first(self) -> None:
        queue = EvictionQueue(least_recently_used)
        one, two, three = nodes = [leaf(value) for value in (1, 2, 3)]
        for node in nodes:
            queue.push(node)
        three.last_access = 0
        queue.worth_less(three)
        one.last_access = 9
        assert [queue.pop() for _ in range(4)] == [three, two, one, None]

    def test_what_is_no_leaf_any_more_is_passed_over(self) -> None:
        queue = EvictionQueue(least_recently_used)
        locked, parent, gone, free = nodes = [leaf(value) for value in range(4)]
        for node in nodes:
            queue.push(node)
        locked.lock_count, gone.pages = 1, []
        parent.children[("", 1)] = leaf(0)
        assert queue.pop() is free
        assert queue.pop() is None
        locked.lock_count = 0
        queue.push(locked)
        assert queue.pop() is locked

    def test_stale_entries_do_not_pile_up(self) -> None:
        queue = EvictionQueue(least_recently_used)
        nodes = [leaf(10**6) for _ in range(10)]
        for i in range(10_000):
            nodes[i % 10].last_access -= 1
            queue.push(nodes[i % 10])
        assert len(queue._heap) <= 2 * 10 + 65
        assert len({id(queue.pop()) for _ in nodes}) == 10


class TestRetention:
    def make(self) -> tuple[RadixTree, Retention, Node]:
        tree = RadixTree(1, by_value(NUM_PAGES))
        tree.insert(tree.root(""), "", [1, 2, 3, 4], [1, 2, 3, 4])
        return tree, Retention(tree), tree.match_prefix([1, 2, 3, 4], "", 9).node

    def test_the_latest_call_counts(self) -> None:
        _, retention, node = self.make()
        retention.claim("p", node, 2.0, number=5)
        retention.claim("p", node, 1.0, number=4)
        assert node.claims == {2.0: 1}
        retention.claim("p", node, 3.0, number=6)
        assert node.claims == {3.0: 1}
        retention.claim("q", node, 3.0, number=1)
        assert node.claims == {3.0: 2}
        retention.check()

    def test_a_call_that_has_the_path_ends_what_was_said_before_it(self) -> None:
        tree, retention, node = self.make()
        part = tree.end_of(tree.match_prefix([1, 2, 9], "", 9))
        retention.claim("p", part, 1.0, number=1)
        retention.claim("p", node, 1.0, number=8)
        retention.fulfil("p", node, 5)
        assert (part.claims, node.claims) == ({1.0: 1}, {1.0: 1}), "a later call still wants all of it"
        retention.claim("p", part, 1.0, number=3)
        assert part.claims == {1.0: 1}, "who ends late brings nothing back"
        retention.fulfil("p", node, 9)
        assert (part.claims, node.claims, retention.num_claims) == ({}, {}, 0)
        retention.check()

    def test_splits_and_evictions_keep_the_count(self) -> None:
        tree, retention, node = self.make()
        retention.claim("p", node, 1.0)
        part = tree.end_of(tree.match_prefix([1, 2, 9], "", 9))
        assert (part.pages, part.claims, node.claims) == ([1, 2], {1.0: 1}, {1.0: 1})
        assert tree.evict(2) == [3, 4]
        retention.check()
        tree.insert(tree.root(""), "", [1, 2, 3], [1, 2, 7])
        tree.end_of(tree.match_prefix([1, 9], "", 9))  # above the evicted node
        retention.check()
        retention.let_go("p")
        retention.let_go("p")
        retention.check()
        assert all(not each.claims for each in tree.nodes())

    def test_a_root_is_nothing_to_keep(self) -> None:
        tree, retention, _ = self.make()
        retention.claim("p", tree.root(""), 1.0)
        assert retention.num_claims == 0


@pytest.mark.parametrize("num_ready", [0, 1, 2])
def test_a_claim_goes_as_far_as_pages_are_ready(num_ready: int) -> None:
    cache = KVCache(NUM_PAGES, 1)
    pages = cache.admit("a", [1, 2, 3], use=CALL)
    assert hasattr(pages, "block_table")
    cache.mark_computed(pages, num_ready)
    cache.claim("p", [1, 2, 9], "", num_tokens=2, steps=1)
    assert cache.retention is not None
    assert cache.retention.num_claims == min(1, num_ready)
    cache.check()
    claimed = [node.tokens for node in cache.tree.nodes() if node.claims and node.pages]
    assert claimed == ([[1, 2][:num_ready]] if num_ready else [])
    cache.release(pages, [1, 2, 3], insert_into_tree=False)
    cache.check()
    assert cache.tree.num_pages == num_ready, "what somebody waits for stays"
