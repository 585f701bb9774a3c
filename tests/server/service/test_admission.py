"""The bound on live calls, on a clock of the test's own: shares, rates, and an open loop at ten times the rate."""

import random
from collections import Counter

import pytest

from macaw.errors import InvalidProgramError, OverloadedError
from macaw_server.service import Tenant
from macaw_server.service.admission import Admission

A, B, HEAVY = Tenant("a", "salt-a"), Tenant("b", "salt-b"), Tenant("heavy", "salt-h", 2.0)


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def fill(admission, tenant):
    """Begin calls until one is refused; returns how many it has then, and the refusal."""
    while True:
        try:
            admission.begin(tenant, 1)
        except OverloadedError as error:
            return admission.num_live_of(tenant), error


def test_one_tenant_alone_leaves_room_for_others_and_the_only_one_need_not(clock):
    assert fill(Admission(100, shared=True, clock=clock), A)[0] == 80
    assert fill(Admission(100, shared=False, clock=clock), A)[0] == 100


@pytest.mark.parametrize(("first", "second", "shares"), [(A, B, (44, 45)), (A, HEAVY, (31, 62))])
def test_tenants_that_want_everything_come_to_their_weights(clock, first, second, shares):
    admission = Admission(100, shared=True, clock=clock)
    fill(admission, first)
    assert fill(admission, second)[0] >= 16, "at once, before anything has ended"
    rng = random.Random(0)
    for _ in range(2000):
        ends = rng.choices((first, second), (admission.num_live_of(first), admission.num_live_of(second)))[0]
        admission.end(ends, 1)
        for tenant in rng.sample((first, second), 2):
            fill(admission, tenant)
    for tenant, share in zip((first, second), shares, strict=True):
        assert abs(admission.num_live_of(tenant) - share) <= 3


def test_a_refusal_changes_nothing_and_says_whose_share_is_full(clock):
    admission = Admission(100, shared=True, clock=clock)
    num, error = fill(admission, A)
    assert "80 calls of this API key are waiting or running" in error.message
    assert (admission.num_live_of(A), admission.num_live) == (num, num)
    admission.begin(B, 20)
    with pytest.raises(OverloadedError, match="100 calls are waiting or running; with 1 more"):
        admission.begin(B, 1)
    with pytest.raises(InvalidProgramError, match="101 calls at once are over this server's limit of 100"):
        admission.begin(B, 101)


def test_retry_after_is_from_the_tenants_own_rate(clock):
    admission = Admission(100, shared=True, clock=clock)
    assert fill(admission, A)[1].retry_after_s == 60.0, "nothing is known"
    for _ in range(10):
        admission.end(A, 1)
        clock.now_s += 10.0
    for _ in range(4):
        clock.now_s += 1.0
        admission.begin(B, 10)
        admission.end(B, 10)
    _, error = fill(admission, A)
    assert error.retry_after_s == pytest.approx(1 / (4 / 45), abs=3), "A's calls end every ten seconds"
    with pytest.raises(OverloadedError) as of_b:
        admission.begin(B, 21)
    assert of_b.value.retry_after_s < error.retry_after_s, "the bound of all is full, and all end faster"


def test_calls_that_began_together_end_together(clock):
    """Batches of calls that take ten seconds: eight end per second in the mean, and none before the batch does."""
    admission = Admission(100, shared=True, clock=clock)
    for _ in range(3):
        fill(admission, A)
        clock.now_s += 10.0
        admission.end(A, 80)
    fill(admission, A)
    clock.now_s += 3.0
    assert fill(admission, A)[1].retry_after_s == 7.0
    clock.now_s += 9.0
    assert fill(admission, A)[1].retry_after_s == 2.0, "they are late, and may be as late again"


def test_calls_that_are_refused_after_all_do_not_count_as_served(clock):
    admission = Admission(10, shared=False, clock=clock)
    admission.begin(A, 10)
    admission.end(A, 10, served=False)
    assert fill(admission, A)[1].retry_after_s == 60.0


def test_ten_times_the_rate_from_one_tenant_neither_grows_nor_stops_another(clock):
    """Open loop: one call ends per tick, the first that came; A sends ten per tick, B one every fourth."""
    admission, queue, waits = Admission(40, shared=True, clock=clock), [], {A: [], B: []}
    refused, retries = Counter(), []
    for tick in range(2000):
        clock.now_s += 0.1
        for tenant in [A] * 10 + [B] * (tick % 4 == 0):
            try:
                admission.begin(tenant, 1)
                queue.append((tick, tenant))
            except OverloadedError as error:
                refused[tenant] += 1
                retries.append(error.retry_after_s)
        assert admission.num_live == len(queue) <= 40
        began, tenant = queue.pop(0)
        admission.end(tenant, 1)
        waits[tenant].append(tick - began)
    assert refused[A] > 18_000
    assert refused[B] == 0
    assert set(retries[500:]) <= {1.0, 2.0}, "ten calls end per second"
    assert max(*waits[A], *waits[B]) <= 40
    assert len(waits[B]) > 480
