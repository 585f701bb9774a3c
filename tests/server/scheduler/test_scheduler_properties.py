"""Random requests on tiny engines: nothing is lost, mixed up, starved or computed twice."""

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from macaw_server.engine.types import CallClass, Reuse
from macaw_server.scheduler import SequenceStatus, make_policy
from server.scheduler.engine_model import STOP, EngineModel, NoisyOracle

FAMILIES = [[0] * 20, [0] * 6 + [1] * 14, [0, 1] * 10, [0] * 6 + [2, 3] * 7]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(4, 24),
        page_size=st.integers(1, 3),
        max_num_seqs=st.integers(1, 6),
        extra_tokens=st.integers(0, 12),
        max_prefill_chunk=st.sampled_from([None, None, 1, 3]),
        policy=st.sampled_from(["fcfs", "app"]),
        ageing_s=st.sampled_from([0.05, 30.0]),
        max_draft_tokens=st.sampled_from([0, 1, 5]),
        ridge=st.sampled_from([1.0, 1e6]),
        latency_slowdown=st.sampled_from([1.0, 1.5, 1e6]),
        noise=st.sampled_from([0.0, 0.3, 1.0]),
        overlap=st.booleans(),
        max_ahead_seqs=st.integers(1, 3),
        ahead_rows=st.sampled_from([0, 4, 100]),
        eviction=st.sampled_from(["value", "value", "lru"]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        single_flight=st.sampled_from([True, True, False]),
        task_groups=st.booleans(),
    )
    def start(self, num_pages, page_size, max_num_seqs, extra_tokens, policy, ageing_s, noise, task_groups, **limits):
        strategy = make_policy(policy, task_groups=task_groups)
        strategy.ageing_s = ageing_s
        self.engine = EngineModel(
            num_pages,
            page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_tokens,
            max_model_len=24,
            make_proposer=lambda request: NoisyOracle(noise),
            **limits,
            policy=strategy,
        )
        self.aborted = set()
        self.prefix_caching = limits["prefix_caching"]

    @rule(
        family=st.sampled_from(FAMILIES),
        shared=st.integers(0, 8) | st.integers(0, 20),
        own=st.lists(st.sampled_from([0, 1, 2, 3]), max_size=4),
        output=st.lists(st.sampled_from([0, 1]), max_size=2),
        max_tokens=st.integers(1, 16),
        stop=st.sampled_from([frozenset(), frozenset({STOP})]),
        min_tokens=st.integers(0, 3),
        salt=st.sampled_from(["", "", "tenant"]),
        call_class=st.sampled_from(CallClass),
        prefill_only=st.booleans(),
        depth=st.integers(0, 2),
        tenant=st.sampled_from(["", "", "other"]),
        program_id=st.sampled_from(["p", "q"]),
        work_tokens=st.sampled_from([None, 10.0, 1000.0]),
        deadline_s=st.sampled_from([math.inf, 1.1, 30.0]),
        reuse=st.lists(st.builds(Reuse, st.sampled_from([None, 0, 3, 9]), st.integers(1, 3)), max_size=2).map(tuple),
        may_return=st.booleans(),
        copies=st.integers(1, 3),
    )
    def add(self, family, shared, own, output, copies, **kwargs):
        if kwargs["call_class"] is CallClass.AHEAD:  # nothing else is asked for ahead of time
            kwargs["prefill_only"] = True
        output = [] if kwargs["prefill_only"] else output
        prompt = (family[:shared] + own)[: self.engine.max_len - 1] or [0]
        for _ in range(copies):
            self.engine.add(f"r{len(self.engine.sequences)}", prompt, output=tuple(output), **kwargs)

    @rule(steps=st.integers(1, 5))
    def step(self, steps):
        for _ in range(steps):
            batch = self.engine.step()
            assert batch.chunks or not self.engine.scheduler.has_work

    @precondition(lambda self: self.engine.sequences)
    @rule(data=st.data(), keep=st.booleans())
    def abort(self, data, keep):
        request_id = data.draw(st.sampled_from(sorted(self.engine.sequences)))
        if request_id not in self.engine.finished:
            self.aborted.add(request_id)
        self.engine.scheduler.abort(request_id, keep_pages=keep)

    @rule(holder=st.sampled_from(["p", "q", "r0", "r1"]))
    def let_go(self, holder):
        self.engine.scheduler.let_go([holder])

    @rule(seconds=st.sampled_from([0.02, 40.0]))
    def wait(self, seconds):
        self.engine.now_s += seconds

    @invariant()
    def every_request_is_somewhere(self):
        self.engine.cache.check()
        ended = set(self.engine.finished) | self.aborted
        assert len(self.engine.finished) == len(set(self.engine.finished))
        for request_id, sequence in self.engine.sequences.items():
            assert (sequence.status is SequenceStatus.FINISHED) == (request_id in ended)
            assert (sequence.allocation is not None) == (sequence.status is SequenceStatus.RUNNING)
        stats = self.engine.scheduler.stats()
        if not self.prefix_caching:
            assert (stats.cached_tokens, stats.pages_cached, stats.evicted_pages) == (0, 0, 0)
        assert stats.running + stats.waiting == len(self.engine.sequences) - len(ended)

    def teardown(self):
        if not hasattr(self, "engine"):  # hypothesis may give up before `start`
            return
        # Nobody starves: at the very worst all run one after the other, a token at a time.
        live = [s for s in self.engine.sequences.values() if s.status is not SequenceStatus.FINISHED]
        self.engine.run(max_steps=sum(2 * self.engine.max_len for _ in live))
        for request_id in self.engine.finished:
            self.engine.check_finished(self.engine.sequences[request_id])
        assert set(self.engine.finished) | self.aborted == set(self.engine.sequences)
        self.engine.check_no_leak()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
