import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from macaw_server.kvcache import PagePool


def test_a_fresh_pool_fills_in_order_and_takes_pages_back():
    pool = PagePool(4)
    assert pool.allocate(3) == [0, 1, 2]
    pool.free([1])
    assert pool.num_free == 2
    assert sorted(pool.allocate(2)) == [1, 3]
    assert pool.allocate(0) == []


def test_misuse_is_caught_with_numbers():
    pool = PagePool(2)
    with pytest.raises(AssertionError, match="3 pages asked for, 2 of 2 are free"):
        pool.allocate(3)
    (page,) = pool.allocate(1)
    pool.free([page])
    with pytest.raises(AssertionError, match="page 0 freed twice"):
        pool.free([page])
    for foreign in (-1, 2):
        with pytest.raises(AssertionError, match=rf"page {foreign} is not one of this pool's 0 to 1"):
            pool.free([foreign])
    with pytest.raises(ValueError, match="A pool of 0 pages"):
        PagePool(0)


class PagePoolMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool, self.taken = PagePool(7), []

    @rule(n=st.integers(0, 7))
    def allocate(self, n):
        if n <= self.pool.num_free:
            pages = self.pool.allocate(n)
            assert len(pages) == n
            assert not set(pages) & set(self.taken)
            self.taken += pages

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data):
        pages = data.draw(st.lists(st.sampled_from(self.taken), unique=True))
        self.pool.free(pages)
        self.taken = [page for page in self.taken if page not in pages]

    @invariant()
    def conserves_pages(self):
        assert self.pool.num_free == 7 - len(self.taken)
        assert {page for page in range(7) if not self.pool.is_free(page)} == set(self.taken)


TestPagePoolMachine = PagePoolMachine.TestCase
TestPagePoolMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
