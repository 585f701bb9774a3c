from itertools import takewhile
from operator import eq

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from macaw_server.kvcache import NO_USE, Allocation, Blocked, KVCache, Use
from server.kvcache.kv_memory import KVMemory, prefix_hashes


def prefill(cache, request_id, tokens, salt=""):
    allocation = cache.admit(request_id, tokens, salt)
    assert isinstance(allocation, Allocation)
    cache.mark_computed(allocation, len(tokens) - allocation.num_computed)
    return allocation


def test_a_released_prompt_and_output_is_found_again():
    cache = KVCache(num_pages=8, page_size=2)
    first = prefill(cache, "a", [1, 2, 3])
    assert cache.extend(first) is True
    cache.mark_computed(first, 2)  # decoded 4 and 5: [1 2] [3 4] [5 .]
    table = first.block_table
    cache.release(first, [1, 2, 3, 4, 5, 6])
    cache.check()
    assert (cache.pool.num_free, cache.tree.num_pages) == (6, 2), "the partial page is free again"
    again = cache.admit("b", [1, 2, 3, 4, 5, 6, 7])
    assert again.num_cached == 4
    assert again.block_table[:2] == table[:2]


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4)])
def test_the_last_token_is_always_left_to_compute(length, cached):
    cache = KVCache(num_pages=8, page_size=2)
    cache.release(prefill(cache, "a", [1, 2, 3, 4, 5, 6]), [1, 2, 3, 4, 5, 6])
    assert cache.admit("b", [1, 2, 3, 4, 5, 6][:length]).num_cached == cached
    cache.check()


def test_the_same_full_prompt_twice_gives_the_second_a_last_page_of_its_own():
    cache = KVCache(num_pages=8, page_size=2)
    first = cache.admit("a", [1, 2, 3, 4])
    assert cache.admit("b", [1, 2, 3, 4]) == Blocked("a", 1)
    cache.mark_computed(first, 2)
    second = cache.admit("b", [1, 2, 3, 4])
    assert second.block_table[0] == first.block_table[0]
    assert second.block_table[1] != first.block_table[1]
    cache.check()
    cache.mark_computed(second, 2)
    cache.mark_computed(first, 2)
    cache.release(second, [1, 2, 3, 4])
    cache.release(first, [1, 2, 3, 4])
    cache.check()
    assert cache.tree.num_pages == 2, "the duplicate is freed"


def test_another_tenant_neither_finds_nor_waits():
    cache = KVCache(num_pages=8, page_size=2)
    cache.admit("a", [1, 2, 3], "tenant-a")
    other = cache.admit("b", [1, 2, 3], "tenant-b")
    assert isinstance(other, Allocation)
    assert other.num_cached == 0


def test_who_runs_into_pending_pages_waits_for_all_it_can_use():
    cache = KVCache(num_pages=16, page_size=2)
    owner = cache.admit("a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert cache.admit("b", [1, 2, 3, 4, 9, 9, 9]) == Blocked("a", 2)
    assert cache.admit("c", [1, 2, 3, 4, 5, 6]) == Blocked("a", 2)
    cache.mark_computed(owner, 3)
    assert cache.admit("b", [1, 2, 3, 4, 9, 9, 9]) == Blocked("a", 2), "a page is ready with its last token"
    cache.mark_computed(owner, 1)
    assert cache.admit("b", [1, 2, 3, 4, 9, 9, 9]).num_cached == 4
    assert cache.admit("c", [1, 2, 3, 4, 5, 6]).num_cached == 4
    assert cache.admit("d", [1, 2, 3, 4, 9, 9, 8]) == Blocked("b", 3)
    cache.check()


@pytest.mark.parametrize("keep", [True, False])
def test_an_owner_that_leaves_takes_its_pending_pages_along(keep):
    cache = KVCache(num_pages=8, page_size=2)
    owner = cache.admit("a", [1, 2, 3, 4, 5, 6, 7])
    cache.mark_computed(owner, 3)
    assert cache.admit("b", [1, 2, 3, 4, 5, 6, 7]) == Blocked("a", 3)
    cache.release(owner, [1, 2, 3, 4, 5, 6, 7], insert_into_tree=keep, num_wanted=3)
    cache.check()
    heir = cache.admit("b", [1, 2, 3, 4, 5, 6, 7])
    assert heir.num_cached == 2, "what was ready and is waited for is not computed again"
    assert cache.admit("c", [1, 2, 3, 4, 5, 6, 7]) == Blocked("b", 3)


def test_dropping_frees_what_nobody_else_used_and_nothing_more():
    cache = KVCache(num_pages=16, page_size=2)
    cache.release(prefill(cache, "old", [1, 2, 3]), [1, 2, 3])
    mine = prefill(cache, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])  # cached [1 2], own [3 4] [5 6] [7 8] [9 .]
    cache.release(prefill(cache, "b", [1, 2, 3, 4, 6, 6, 6]), [1, 2, 3, 4, 6, 6, 6])  # used [3 4], added [6 6]
    cache.release(mine, [1, 2, 3, 4, 5, 6, 7, 8, 9], insert_into_tree=False)
    cache.check()
    assert cache.tree.match_prefix([1, 2, 3, 4, 5, 6, 7, 8], "", 9).pages == mine.block_table[:2]
    assert cache.tree.match_prefix([1, 2, 3, 4, 6, 6], "", 9).pages[:2] == mine.block_table[:2]
    assert cache.pool.num_free == 16 - 3


def test_admission_is_all_or_nothing_and_evicts_only_what_it_must():
    cache = KVCache(num_pages=6, page_size=1)
    cache.release(prefill(cache, "old", [1, 2, 3]), [1, 2, 3])
    running = prefill(cache, "run", [7, 8])
    assert cache.num_available == 4
    assert cache.admit("big", [9] * 5) is None
    assert cache.admit("next", [9, 9, 9], reserve=2) is None
    assert (cache.tree.num_pages, cache.num_evicted) == (5, 0), "a refusal changes nothing"
    cache.check()
    assert cache.admit("next", [9, 9, 9], reserve=1).num_cached == 0
    assert cache.num_evicted == 2
    assert running.block_table == cache.tree.match_prefix([7, 8], "", 9).pages
    cache.check()


def test_a_cached_prefix_is_not_counted_as_room_for_the_rest():
    cache = KVCache(num_pages=4, page_size=1)
    cache.release(prefill(cache, "old", [1, 2, 3]), [1, 2, 3])
    assert cache.admit("a", [1, 2, 3, 4, 5]) is None, "3 cached pages and 1 free one do not make 5"
    fits = cache.admit("b", [1, 2, 3, 4])
    assert fits.num_cached == 3
    assert cache.extend(fits) is False


PUBLIC_TEXT = [5, 5, 6, 6, 7]


def cached(cache, tokens, salt):
    """How many tokens a request of this tenant would find."""
    allocation = cache.admit("probe", tokens, salt)
    cache.release(allocation, tokens, insert_into_tree=False)
    return allocation.num_cached


def test_declared_text_is_found_by_every_tenant_and_nothing_behind_it():
    cache = KVCache(num_pages=32, page_size=2, public_prefixes=[PUBLIC_TEXT])
    tokens = [*PUBLIC_TEXT, 8, 9, 9, 9]  # pages [5 5] [6 6], which are public, then [7 8] [9 9]
    cache.release(prefill(cache, "a", tokens, "a"), tokens)
    cache.check()
    assert (cached(cache, tokens, "a"), cached(cache, tokens, "b"), cached(cache, tokens, "")) == (8, 4, 4)
    assert cached(cache, [*PUBLIC_TEXT[:3], 8, 9], "b") == 2, "the front of the text is public too"
    cache.release(prefill(cache, "b", tokens, "b"), tokens)
    cache.check()
    assert cached(cache, tokens, "b") == 8
    assert cached(cache, tokens, "c") == 4
    assert cache.tree.num_pages == 2 + 2 + 2


def test_tenants_wait_for_declared_text_and_each_for_its_own_behind_it():
    cache = KVCache(num_pages=32, page_size=2, public_prefixes=[PUBLIC_TEXT])
    tokens = [*PUBLIC_TEXT, 8, 9, 9, 9]
    owner = cache.admit("a", tokens, "a")
    assert cache.admit("b", tokens, "b") == Blocked("a", 2)
    assert cache.admit("mine", tokens, "a") == Blocked("a", 2)
    cache.mark_computed(owner, 6)  # into its own text
    cache.check()
    assert cache.admit("mine", tokens, "a") == Blocked("a", 4)
    assert cache.admit("b", tokens, "b").num_cached == 4
    cache.mark_computed(owner, 3)
    assert cache.admit("mine", tokens, "a").num_cached == 8
    cache.check()


def test_an_answer_that_repeats_declared_text_is_still_its_tenants():
    cache = KVCache(num_pages=32, page_size=2, public_prefixes=[PUBLIC_TEXT])
    allocation = prefill(cache, "a", [5], "a")
    cache.mark_computed(allocation, 1)
    cache.release(allocation, [5, 5])
    cache.check()
    assert cache.tree.num_pages == 1
    assert cached(cache, [5, 5, 6], "b") == 0


def test_without_prefix_caching_nothing_is_kept_found_or_waited_for():
    cache = KVCache(num_pages=8, page_size=2, public_prefixes=[PUBLIC_TEXT], prefix_caching=False)
    tokens = [*PUBLIC_TEXT, 8]
    first = prefill(cache, "a", tokens)
    second = cache.admit("b", tokens)
    assert second.num_cached == 0
    assert not set(first.block_table) & set(second.block_table)
    assert not cache.covers(tokens)
    cache.release(first, tokens)
    cache.release(second, tokens, insert_into_tree=False)
    cache.check()
    assert cached(cache, tokens, "") == 0
    assert (cache.pool.num_free, cache.tree.salts) == (8, set())


def test_without_single_flight_a_prefix_is_found_when_its_step_is_over_and_computed_again_before():
    cache = KVCache(num_pages=32, page_size=2, single_flight=False)
    tokens = [1, 2, 3, 4, 5, 6, 7]
    first = prefill(cache, "a", tokens)
    second = prefill(cache, "b", tokens)
    assert second.num_cached == 0, "both in one step"
    assert not set(first.block_table) & set(second.block_table)
    cache.step_ended(second)
    assert cached(cache, tokens, "") == 0, "its pages stay its own, for those of the first are on their way"
    cache.step_ended(first)
    third = cache.admit("c", tokens)
    assert third.block_table[:3] == first.block_table[:3]
    for allocation in (second, third, first):
        cache.release(allocation, tokens)
        cache.check()
    assert cache.tree.num_pages == 3, "duplicates are freed"


def test_without_single_flight_what_is_ready_of_a_prefix_is_shared():
    cache = KVCache(num_pages=32, page_size=2, single_flight=False)
    tokens = [1, 2, 3, 4, 5, 6, 7]
    owner = cache.admit("a", tokens)
    cache.mark_computed(owner, 5)
    cache.step_ended(owner)
    other = cache.admit("b", [1, 2, 3, 4, 5, 6, 9])
    assert (other.num_cached, other.block_table[:2]) == (4, owner.block_table[:2])
    cache.check()
    cache.release(owner, tokens, insert_into_tree=False)
    cache.check()
    cache.mark_computed(other, 3)
    cache.release(other, [1, 2, 3, 4, 5, 6, 9])
    cache.check()
    assert cached(cache, tokens, "") == 6


def test_without_single_flight_an_abort_within_a_step_keeps_what_lies_behind_declared_text():
    cache = KVCache(num_pages=32, page_size=2, public_prefixes=[PUBLIC_TEXT], single_flight=False)
    tokens = [*PUBLIC_TEXT, 8, 9, 9, 9]
    cache.release(prefill(cache, "a", tokens, "a"), tokens)
    cache.check()
    assert (cached(cache, tokens, "a"), cached(cache, tokens, "b")) == (8, 4)


class KVCacheMachine(RuleBasedStateMachine):
    """Requests of a small alphabet on a small pool; the memory model looks at every slot."""

    @initialize(
        num_pages=st.integers(3, 12),
        page_size=st.integers(1, 3),
        public=st.lists(st.lists(st.sampled_from([0, 0, 0, 1]), max_size=8), max_size=2),
        with_claims=st.booleans(),
        prefix_caching=st.sampled_from([True, True, True, False]),
        single_flight=st.sampled_from([True, True, False]),
    )
    def start(self, num_pages, page_size, public, with_claims, prefix_caching, single_flight):
        self.public, self.with_claims = public if prefix_caching else [], with_claims and prefix_caching
        self.prefix_caching, self.single_flight = prefix_caching, single_flight
        self.cache = KVCache(num_pages, page_size, public, prefix_caching=prefix_caching, single_flight=single_flight)
        self.memory = KVMemory(self.cache)
        self.live = {}  # request id -> (allocation, tokens, salt)
        self.num_made = 0

    def hashes(self, salt, tokens, num_public=None):
        """What each position must hold: declared text is its own, whoever sent it, and all else its tenant's."""
        if num_public is None:
            common = (sum(takewhile(bool, map(eq, prefix, tokens))) for prefix in self.public)
            num_public = max((num_tokens // self.cache.page_size for num_tokens in common), default=0)
        return prefix_hashes(salt, tokens, num_public * self.cache.page_size)

    @rule(
        tokens=st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=12),
        salt=st.sampled_from(["", "tenant", "other"]),
        reserve=st.integers(0, 2),
        use=st.sampled_from([NO_USE, Use("p", False), Use("q", True)]),
    )
    def admit(self, tokens, salt, reserve, use):
        size, ready = self.cache.page_size, self.memory.ready_prefixes()
        ends = self.hashes(salt, tokens)[size - 1 :: size][: (len(tokens) - 1) // size]
        if not self.prefix_caching:
            assert not ready
        in_flight = {
            self.hashes(other_salt, other, allocation.num_public)[(i + 1) * size - 1]: request_id
            for request_id, (allocation, other, other_salt) in self.live.items()
            for i in range(allocation.num_computed // size, allocation.num_tree_pages)
        }
        self.num_made += 1
        result = self.cache.admit(f"r{self.num_made}", tokens, salt, reserve=reserve, use=use)
        num_ready = next((i for i, end in enumerate(ends) if end not in ready), len(ends))
        num_there = next((i for i, end in enumerate(ends) if end not in ready | in_flight), len(ends))
        if num_there > num_ready and self.single_flight:
            assert result == Blocked(in_flight[ends[num_ready]], num_there)
        elif result is not None:
            assert result.num_cached == num_ready * size
            assert len(result.block_table) == -(-len(tokens) // size)
            assert self.cache.num_available >= reserve
            self.live[f"r{self.num_made}"] = (result, list(tokens), salt)
        else:
            held = {page for allocation, *_ in self.live.values() for page in allocation.block_table}
            mine = {ready[end] for end in ends[:num_ready]}
            num_new = -(-len(tokens) // size) - num_ready
            assert self.cache.num_pages - len(held | mine) < num_new + reserve, "there was room"

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_tokens=st.integers(1, 6), token=st.sampled_from([0, 1]), ends=st.booleans())
    def compute(self, data, num_tokens, token, ends):
        allocation, tokens, salt = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        start = allocation.num_computed
        if start == len(tokens):
            tokens.append(token)
            if start == len(allocation.block_table) * self.cache.page_size and not self.cache.extend(allocation):
                assert self.cache.num_available == 0
                tokens.pop()
                return
        num_tokens = min(num_tokens, len(tokens) - start)
        hashes = self.hashes(salt, tokens, allocation.num_public)
        self.memory.check(allocation.block_table, hashes, start)
        self.memory.write(allocation.block_table, hashes, start, start + num_tokens)
        self.cache.mark_computed(allocation, num_tokens)
        if ends:
            self.cache.step_ended(allocation)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data, keep):
        allocation, tokens, salt = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        num_full = allocation.num_computed // self.cache.page_size
        self.cache.release(allocation, tokens, insert_into_tree=keep)
        if keep and self.prefix_caching:
            found = self.cache.tree.match_prefix(tokens, salt, num_full, allocation.num_public)
            assert len(found.pages) == num_full or found.owner is not None, "it was computed and is not kept"

    @precondition(lambda self: self.with_claims)
    @rule(
        holder=st.sampled_from("pq"),
        tokens=st.lists(st.sampled_from([0, 0, 0, 1]), max_size=12),
        salt=st.sampled_from(["", "tenant", "other"]),
        steps=st.integers(0, 2),
        number=st.integers(0, 3),
    )
    def claim(self, holder, tokens, salt, steps, number):
        self.cache.claim(holder, tokens, salt, num_tokens=len(tokens), steps=steps, number=number)

    @rule(holder=st.sampled_from("pq"))
    def let_go(self, holder):
        if self.cache.retention is not None:
            self.cache.retention.let_go(holder)

    @invariant()
    def nothing_is_lost_or_mixed_up(self):
        self.cache.check()
        self.memory.ready_prefixes()
        for node in self.cache.tree.nodes():
            stays = node.children or node.num_users or self.with_claims
            assert stays or not node.pages, "pages stay that only cancelled requests used"
        for allocation, tokens, salt in self.live.values():
            hashes = self.hashes(salt, tokens, allocation.num_public)
            self.memory.check(allocation.block_table, hashes, allocation.num_computed)

    def teardown(self):
        if hasattr(self, "cache"):  # hypothesis may give up before `start`
            for allocation, tokens, _ in self.live.values():
                self.cache.release(allocation, tokens)
            for holder in "pq":
                self.let_go(holder)
            assert self.cache.retention is None or self.cache.retention.num_claims == 0
            self.cache.check()
            self.cache.pool.free(self.cache.tree.evict(self.cache.num_pages))
            assert self.cache.pool.num_free == self.cache.num_pages
            assert self.cache.tree.salts == set()


TestKVCacheMachine = KVCacheMachine.TestCase
TestKVCacheMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
