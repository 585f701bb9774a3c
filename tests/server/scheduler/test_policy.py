import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macaw_server.engine.types import CallClass
from macaw_server.scheduler import AGEING_S, AppPolicy, FcfsPolicy, Sequence, make_policy
from macaw_server.scheduler.waiting import WaitingQueue
from server.scheduler.engine_model import request


def sequence(number, arrival_s, call_class=CallClass.LATENCY, depth=0):
    return Sequence(request(f"r{number}", [0], call_class=call_class, depth=depth), arrival_s, number)


def names(policy, sequences, now_s):
    return [s.request_id for s in sorted(sequences, key=lambda s: policy.order(s, now_s))]


CALLS = [
    sequence(0, 10.0, CallClass.BACKGROUND),
    sequence(1, 11.0, CallClass.GROUP),
    sequence(2, 12.0, CallClass.LATENCY),
    sequence(3, 13.0, CallClass.LATENCY, depth=2),
    sequence(4, 14.0, CallClass.GROUP, depth=1),
    sequence(5, 14.0, CallClass.GROUP, depth=1),
]


def test_fcfs_is_by_arrival():
    assert names(FcfsPolicy(), reversed(CALLS), 20.0) == ["r0", "r1", "r2", "r3", "r4", "r5"]


def test_app_is_by_class_then_depth_then_arrival():
    assert names(AppPolicy(), CALLS, 20.0) == ["r3", "r2", "r4", "r5", "r1", "r0"]


def test_whoever_has_aged_goes_first_by_arrival():
    now_s = 11.5 + AGEING_S
    assert names(AppPolicy(), CALLS, now_s) == ["r0", "r1", "r3", "r2", "r4", "r5"]


def test_policies_have_names():
    assert isinstance(make_policy("fcfs"), FcfsPolicy)
    assert isinstance(make_policy(), AppPolicy)
    with pytest.raises(ValueError, match=r"No scheduling policy 'sjf'; choose one of app, fcfs\."):
        make_policy("sjf")


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 60), st.sampled_from(CallClass), st.integers(0, 2)),
        st.tuples(st.sampled_from(["first", "again"]), st.integers(0, 60)),
        st.tuples(st.just("remove"), st.integers(0, 60)),
    ),
    max_size=150,
)


@given(OPERATIONS, st.sampled_from([FcfsPolicy, AppPolicy]))
@settings(max_examples=100, deadline=None)
def test_the_waiting_queue_is_a_sorted_list(operations, policy_type):
    policy = policy_type()
    queue, model = WaitingQueue(policy), []
    for number, (operation, value, *hints) in enumerate(operations):
        if operation == "push":
            model.append(sequence(number, float(value), *hints))
            queue.push(model[-1])
        elif operation == "remove" and model:
            queue.remove(model.pop(value % len(model)))
        else:
            first = queue.first(float(value))
            assert first is min(model, key=lambda s: policy.order(s, float(value)), default=None)
            if operation == "again" and first:  # admitted, preempted
                queue.remove(first)
                queue.push(first)
        assert len(queue) == len(model)


def test_the_waiting_queue_forgets_what_left():
    queue = WaitingQueue(AppPolicy())
    waiting = sequence(0, 0.0, CallClass.BACKGROUND)
    queue.push(waiting)
    for number in range(1, 2000):  # all of them pass the first one, which stays at the front by arrival
        passing = sequence(number, 1.0)
        queue.push(passing)
        assert queue.first(2.0) is passing
        queue.remove(passing)
        queue.remove(waiting)  # preempted again and again
        queue.push(waiting)
    (lane,) = queue._others._lanes.values()
    assert max(len(lane.by_key), len(lane.by_due)) < 100
    assert len(queue._critical._lanes) <= 1
