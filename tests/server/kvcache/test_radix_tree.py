from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from macaw_server.kvcache import RadixTree
from macaw_server.kvcache.eviction import by_value, least_recently_used
from macaw_server.kvcache.retention import Retention

ALL = 10**6


def match(tree, tokens, salt=""):
    return tree.match_prefix(tokens, salt, ALL).pages


def test_finds_the_longest_prefix_of_full_pages():
    tree = RadixTree(page_size=2)
    assert tree.insert(tree.root(""), "", [1, 2, 3, 4, 5, 6], [10, 11, 12]) == []
    assert match(tree, [1, 2, 3, 4, 5, 6, 7]) == [10, 11, 12]
    assert match(tree, [1, 2, 3, 4, 5]) == [10, 11]
    assert match(tree, [1, 2, 3, 9]) == [10]
    assert match(tree, [1, 9]) == []
    assert tree.match_prefix([1, 2, 3, 4], "", 1).pages == [10]


def test_edges_split_at_page_boundaries_and_duplicates_come_back():
    tree = RadixTree(page_size=2)
    tree.insert(tree.root(""), "", [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert tree.insert(tree.root(""), "", [1, 2, 3, 4, 7, 8], [20, 21, 22]) == [20, 21]
    assert match(tree, [1, 2, 3, 4, 7, 8]) == [10, 11, 22]
    assert match(tree, [1, 2, 3, 4, 5, 6]) == [10, 11, 12]
    runs = sorted(node.pages for node in tree.nodes() if node.parent)
    assert runs == [[10, 11], [12], [22]]
    assert tree.num_pages == tree.num_evictable == 4


def test_salts_do_not_see_each_other_and_empty_roots_go():
    tree = RadixTree(page_size=1)
    tree.insert(tree.root("a"), "a", [1, 2], [0, 1])
    tree.insert(tree.root("b"), "b", [1], [2])
    assert match(tree, [1, 2], "a") == [0, 1]
    assert match(tree, [1, 2], "b") == [2]
    assert match(tree, [1, 2], "c") == []
    assert tree.salts == {"a", "b"}, "looking must not make a namespace"
    assert tree.evict(1) == [1]
    assert sorted(tree.evict(ALL)) == [0, 2]
    assert tree.salts == set()


def test_evicts_the_least_recently_used_leaf_first_from_its_end():
    tree = RadixTree(page_size=1)
    tree.insert(tree.root(""), "", [1, 2, 3], [1, 2, 3])
    tree.insert(tree.root(""), "", [1, 7, 8], [9, 7, 8])
    tree.unlock(tree.lock(tree.match_prefix([1, 2, 3], "", ALL)))  # used again: now the younger one
    assert tree.evict(1) == [8]
    assert tree.evict(2) == [7, 3]
    assert tree.evict(ALL) == [2, 1], "the shared page goes last, after its children"
    assert tree.num_pages == tree.num_evictable == 0


def test_a_locked_path_stays_and_its_siblings_go():
    tree = RadixTree(page_size=1)
    tree.insert(tree.root(""), "", [1, 2, 3], [1, 2, 3])
    tree.insert(tree.root(""), "", [1, 7], [9, 7])
    node = tree.lock(tree.match_prefix([1, 2], "", ALL))
    assert tree.num_evictable == 2
    assert sorted(tree.evict(ALL)) == [3, 7]
    assert match(tree, [1, 2, 3]) == [1, 2]
    tree.unlock(node)
    assert sorted(tree.evict(ALL)) == [1, 2]


def test_the_eviction_value_can_be_replaced():
    keep = {5: 1.0}  # page number -> value
    tree = RadixTree(page_size=1, eviction_value=lambda node: keep.get(node.pages[0], 0.0))
    tree.insert(tree.root(""), "", [5], [5])
    tree.insert(tree.root(""), "", [6], [6])
    assert tree.evict(1) == [6]
    keep[7] = 0.5
    tree.insert(tree.root(""), "", [7], [7])
    keep[7] = 2.0  # risen while it rests: seen at the next eviction
    assert tree.evict(1) == [5]


def test_pending_pages_name_their_owner_until_they_are_ready():
    tree = RadixTree(page_size=1)
    node = tree.insert_pending(tree.lock(tree.match_prefix([1, 2, 3], "", ALL)), "", [1, 2, 3], [1, 2, 3], "a")
    assert tree.match_prefix([1, 9], "", ALL).owner == "a"
    tree.set_ready(node, 2)
    assert tree.match_prefix([1, 2, 9], "", ALL).owner is None
    assert tree.match_prefix([1, 2, 3], "", ALL).owner == "a"
    assert tree.insert(tree.root(""), "", [1, 2, 3, 4], [11, 12, 13, 14]) == [11, 12, 13, 14], "not past pending"
    node, pages = tree.drop_pending(node)
    assert pages == [3]
    assert match(tree, [1, 2, 3]) == [1, 2]
    tree.unlock(node)
    with pytest.raises(AssertionError, match="more often than locked"):
        tree.unlock(node)


def test_a_split_leaves_the_pending_part_to_its_owner():
    tree = RadixTree(page_size=1)
    node = tree.insert_pending(tree.lock(tree.match_prefix([1, 2, 3], "", ALL)), "", [1, 2, 3], [1, 2, 3], "a")
    tree.set_ready(node, 1)
    other = tree.lock(tree.match_prefix([1, 9], "", ALL))
    assert other.pages == [1]
    assert other.lock_count == 2
    assert (node.pages, node.num_ready, node.owner, node.lock_count) == ([2, 3], 0, "a", 1)


SALTS = st.sampled_from(["", "tenant"])
TOKENS = st.lists(st.sampled_from([0, 1]), max_size=9)
SIZE = 2


def prefixes(tokens):
    return [tuple(tokens[:stop]) for stop in range(SIZE, len(tokens) + 1, SIZE)]


class RadixTreeMachine(RuleBasedStateMachine):
    """Against a dict from (salt, tokens of a prefix) to its last page."""

    locked = Bundle("locked")

    @initialize(value=st.sampled_from([least_recently_used, by_value(1), by_value(8)]))
    def start(self, value):
        self.tree, self.model, self.locks = RadixTree(SIZE, value), {}, Counter()
        self.retention = Retention(self.tree)
        self.value = value
        self.num_made = 0

    def found(self, salt, tokens):
        held = []
        for prefix in prefixes(tokens):
            if (salt, prefix) not in self.model:
                break
            held.append(prefix)
        return held

    @rule(salt=SALTS, tokens=TOKENS)
    def insert(self, salt, tokens):
        tokens = tokens[: len(tokens) // SIZE * SIZE]
        if not tokens:
            return
        pages = list(range(self.num_made, self.num_made + len(tokens) // SIZE))
        self.num_made += len(pages)
        num_known = len(self.found(salt, tokens))
        assert self.tree.insert(self.tree.root(salt), salt, tokens, pages) == pages[:num_known]
        for prefix, page in list(zip(prefixes(tokens), pages, strict=True))[num_known:]:
            self.model[salt, prefix] = page

    @rule(salt=SALTS, tokens=TOKENS, limit=st.integers(0, 5))
    def match(self, salt, tokens, limit):
        expected = [self.model[salt, prefix] for prefix in self.found(salt, tokens)][:limit]
        assert self.tree.match_prefix(tokens, salt, limit).pages == expected

    @rule(target=locked, salt=SALTS, tokens=TOKENS)
    def lock(self, salt, tokens):
        held = self.found(salt, tokens)
        node = self.tree.lock(self.tree.match_prefix(tokens, salt, ALL))
        self.locks.update((salt, prefix) for prefix in held)
        return node, salt, held

    @rule(lock=consumes(locked))
    def unlock(self, lock):
        node, salt, held = lock
        self.tree.unlock(node)
        self.locks.subtract((salt, prefix) for prefix in held)

    @rule(holder=st.sampled_from("pq"), salt=SALTS, tokens=TOKENS, steps=st.integers(0, 3), number=st.integers(0, 3))
    def claim(self, holder, salt, tokens, steps, number):
        self.retention.claim(holder, self.tree.end_of(self.tree.match_prefix(tokens, salt, ALL)), steps, number)

    @rule(holder=st.sampled_from("pq"), salt=SALTS, tokens=TOKENS, number=st.integers(0, 3))
    def fulfil(self, holder, salt, tokens, number):
        self.retention.fulfil(holder, self.tree.match_prefix(tokens, salt, ALL).node, number)

    @rule(holder=st.sampled_from("pq"))
    def let_go(self, holder):
        self.retention.let_go(holder)

    @rule(n=st.integers(1, 4))
    def evict(self, n):
        leaves = [node for node in self.tree.nodes() if node.pages and not node.lock_count and not node.children]
        least = min(map(self.value, leaves), default=None)
        firsts = {page for node in leaves if self.value(node) == least for page in node.pages}
        by_page = {page: entry for entry, page in self.model.items()}
        num_unlocked = sum(not self.locks[entry] for entry in self.model)
        evicted = self.tree.evict(n)
        assert len(evicted) == min(n, num_unlocked)
        assert evicted[0] in firsts if evicted else not leaves, "a leaf of less value stayed"
        for page in evicted:
            assert not self.locks[by_page[page]]
            del self.model[by_page[page]]
        for salt, prefix in self.model:
            assert all((salt, shorter) in self.model for shorter in prefixes(prefix)), "a prefix lost its front"

    def teardown(self):
        if hasattr(self, "tree"):
            for holder in "pq":
                self.retention.let_go(holder)
            assert not any(node.claims for node in self.tree.nodes())

    @invariant()
    def counts_agree(self):
        self.retention.check()
        assert self.tree.num_pages == len(self.model)
        assert self.tree.num_evictable == sum(not self.locks[entry] for entry in self.model)
        assert sorted(page for node in self.tree.nodes() for page in node.pages) == sorted(self.model.values())
        for node in self.tree.nodes():
            assert node.pages or node.parent is None
            assert node.pages or node.children or node.lock_count, "an empty root stayed"


TestRadixTreeMachine = RadixTreeMachine.TestCase
TestRadixTreeMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
