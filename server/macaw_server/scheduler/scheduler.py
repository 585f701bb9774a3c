"""Continuous batching: what runs in the next step. Pure: the clock is an argument."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

from macaw_server.engine.types import EngineRequest, EngineStats
from macaw_server.kvcache import NO_USE, Allocation, Blocked, KVCache, Use
from macaw_server.scheduler.ahead import AheadSequences, ahead_budget
from macaw_server.scheduler.budget import StepBudget
from macaw_server.scheduler.drafting import Drafting
from macaw_server.scheduler.fairness import OUTPUT_SERVICE
from macaw_server.scheduler.followers import Followers
from macaw_server.scheduler.limits import check_request, finish_reason, latest_start_s
from macaw_server.scheduler.lookahead import look_ahead
from macaw_server.scheduler.policy import Policy, make_policy
from macaw_server.scheduler.protection import Protection
from macaw_server.scheduler.retainer import Retainer
from macaw_server.scheduler.speculation import ProposerFactory, prompt_lookup
from macaw_server.scheduler.step_time import StepTimeModel
from macaw_server.scheduler.types import (
    ScheduledBatch,
    ScheduledChunk,
    SchedulerConfig,
    Sequence,
    SequenceStatus,
)
from macaw_server.scheduler.waiting import WaitingQueue

MAX_LOOKUPS_PER_STEP = 256
"""Waiting sequences that one step looks up in the cache beyond `max_num_seqs`: a burst of thousands that
share a prefix must not stall the batch while each finds out whom to wait for."""


class Scheduler:
    """Owns all sequences from `add` until they finish or are aborted.

    A step: every running sequence that decodes gets its token; then prefills go on, in policy order; then
    waiting sequences are admitted in policy order, while there are tokens in the budget and pages in the
    pool. While latency-critical sequences decode, or else the calls of the program that is first in order,
    all others share what `StepBudget` leaves them, in policy order: who gets nothing rests in the batch until
    that changes, or until it is due.

    - A sequence whose prefix another one is computing is *blocked*: it takes part again when the prefix is
      there, in the same step if it can, and holds up nobody meanwhile.
    - The first sequence in order that finds no pages ends admission: whoever is behind it might take the
      pages it needs for ever. Sequences that run only give pages back, so it gets in.
    - Admission takes free and evictable pages only, and leaves one page for each running sequence to grow
      into. Pages for decoding may be taken from other sequences (`Policy.preemption_order`); nobody is
      admitted in a step that preempts for them.
    - The first in order that finds no place or no pages gets those of running sequences, one a step, if
      `Policy.preempts` says that they have to give way.
    - Sequences of class AHEAD get what is left when nobody waits (`_run_ahead`), and give their pages back as soon
      as anybody else needs these, a slot, or the prefix that they compute.
    - Drafts get what is left then: tokens of the budget, and pages that are free or can be evicted, less one
      for each running sequence. The pages go back at the end of the step, so speculation neither preempts nor
      holds up anybody.

    Args:
        config: Limits. No sequence gets longer than the page pool, whatever `max_model_len` says.
        kv_cache: Used by this scheduler alone.
        policy: Default: ``app``.
        make_proposer: Makes what proposes a request's draft tokens.
        step_time: Predicts how long a step takes; the caller lets it observe them.

    Attributes:
        ridge: At first that of the configuration; whoever measures steps may set it between them.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv_cache: KVCache,
        policy: Policy | None = None,
        make_proposer: ProposerFactory = prompt_lookup,
        step_time: StepTimeModel | None = None,
    ) -> None:
        self.config = config
        self.kv_cache = kv_cache
        self.policy = policy or make_policy()
        self.ridge = config.ridge
        self._step_time = step_time or StepTimeModel()
        self._max_len = min(config.max_model_len, kv_cache.num_pages * kv_cache.page_size)
        self._drafting = Drafting(config, self._max_len, make_proposer)
        self._retainer = Retainer(kv_cache, self.policy)
        self._sequences: dict[str, Sequence] = {}
        self._waiting = WaitingQueue(self.policy)
        self._running: dict[str, Sequence] = {}  # but for those of class AHEAD
        self._ahead = AheadSequences()
        self._followers = Followers(self.policy)
        self._num_added = 0
        self._protection = Protection(self.policy, self._followers, config.latency_slowdown)
        self._out_of_pages: Sequence | None = None  # who found none in the step before
        self._stats = EngineStats(pages_total=kv_cache.num_pages)

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence that has not finished."""
        return bool(self._sequences)

    @property
    def only_ahead(self) -> bool:
        """Whether there is work, and all of it is of class AHEAD."""
        return self.has_work and all(sequence.is_ahead for sequence in self._sequences.values())

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences that have not finished, in order of arrival here."""
        return list(self._sequences.values())

    def add(self, request: EngineRequest, now_s: float) -> Sequence:
        """Take up a request.

        Returns:
            Its sequence; already finished if the outputs that the request brings along are complete.

        Raises:
            ValueError: It can never run, or its id is in use.
        """
        if request.request_id in self._sequences:
            raise ValueError(f"Request id {request.request_id!r} is in use; ids are unique.")
        pool_len = self.kv_cache.num_pages * self.kv_cache.page_size
        check_request(request, max_model_len=self.config.max_model_len, pool_len=pool_len)
        arrival_s = request.hints.arrival_s
        if not 0 < arrival_s <= now_s:  # not set, or of another clock
            arrival_s = now_s
        self._num_added += 1
        sequence = Sequence(
            request, arrival_s, self._num_added, latest_start_s(request, self._step_time, self.config.latency_slowdown)
        )
        sequence.finish_reason = finish_reason(sequence, self._max_len)
        if sequence.finish_reason:
            sequence.status = SequenceStatus.FINISHED
        else:
            self._sequences[request.request_id] = sequence
            self._queue_of(sequence).push(sequence)
            self._retainer.waits(sequence)
        return sequence

    def abort(self, *request_ids: str, keep_pages: bool = True) -> None:
        """Forget requests; unknown and finished ids are nothing to do.

        Args:
            request_ids: Whose.
            keep_pages: Leave what they have computed in the cache, as when they finish. False frees at once all
                pages that nobody else has used.
        """
        found = [self._sequences[id_] for id_ in dict.fromkeys(request_ids) if id_ in self._sequences]
        for sequence in sorted(found, key=lambda sequence: sequence.status is SequenceStatus.RUNNING):
            was_running = sequence.status is SequenceStatus.RUNNING
            self._retire(sequence, keep_pages=keep_pages)  # who waits for pages of another one goes before it
            if keep_pages and was_running and not sequence.is_ahead:
                self._retainer.ended(sequence)

    def let_go(self, holders: Iterable[str]) -> None:
        """Keep nothing for these programs, and these requests of class AHEAD, any more."""
        self._retainer.let_go(holders)

    def schedule(self, now_s: float) -> ScheduledBatch:
        """Decide what runs in the next step, which the caller then does, and reports by `update`.

        The batch is empty only when there is no work. Cost: near-linear in the sequences that run, are
        admitted or become blocked; those that merely wait cost nothing.
        """
        batch = ScheduledBatch()
        self._allocate_for_decode(batch, now_s)
        may_admit = not batch.preempted
        if may_admit:
            self._make_way(batch, now_s)
        decodes = [sequence for sequence in self._running.values() if sequence.num_uncomputed == 1]
        prefills = [sequence for sequence in self._running.values() if sequence.num_uncomputed > 1]
        protected = self._protection.choose(decodes, now_s)
        max_num_tokens, slowdown = self.config.max_num_batched_tokens, self._protection.slowdown
        budget = StepBudget(max_num_tokens, self._step_time, protected, slowdown)
        self._decode(batch, decodes, budget, now_s)
        for sequence in sorted(prefills, key=lambda sequence: self._followers.order(sequence, now_s)):
            self._run(batch, sequence, budget, now_s)
        if may_admit:
            self._admit(batch, budget, now_s)
        self._run_ahead(batch, now_s)
        if self.config.max_draft_tokens:
            self._drafting.add(batch, self.kv_cache, ridge=self.ridge, reserve=len(self._running))
        assert batch.chunks or batch.finished or not self.has_work, (
            f"{len(self._sequences)} sequences and nothing to run"
        )
        return batch

    def schedule_ahead(self) -> ScheduledBatch | None:
        """Decide what runs after the step in flight, before its tokens are known; None where that must wait for them.

        The batch is run right after the one in flight. When the tokens of that one are known, the caller reports them
        by `update`, then calls `confirm`, and does not `schedule` before it has reported the batch's own tokens too.
        """
        num_waiting = len(self._sequences) - len(self._running)
        if self.config.max_draft_tokens or (num_waiting and len(self._running) < self.config.max_num_seqs):
            return None
        running = self._running.values()
        return look_ahead(running, self.kv_cache, max_len=self._max_len, anybody_waits=num_waiting > 0)

    def confirm(self, ahead: ScheduledBatch) -> None:
        """Count the tokens of a batch of `schedule_ahead` as computed, of those that still take part."""
        for chunk in ahead.chunks:
            if chunk.sequence.status is SequenceStatus.RUNNING:
                self.kv_cache.mark_computed(chunk.sequence.pages, chunk.length)

    def update(
        self, batch: ScheduledBatch, sampled: Mapping[str, Seq[int]], complete: Collection[str] = ()
    ) -> list[Sequence]:
        """Append the tokens sampled in a step; returns the sequences that finished.

        Args:
            batch: As scheduled.
            sampled: By request id: the drafts that were accepted, and the token sampled after them. Tokens of
                sequences that were aborted meanwhile are ignored.
            complete: Requests whose output is complete with these tokens, whatever their limits say; only these
                may have none.
        """
        finished = list(batch.finished)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            self.kv_cache.step_ended(sequence.pages)
            if sequence.request.prefill_only and not sequence.num_uncomputed:
                self._end_prefill(sequence)
                finished.append(sequence)
            if not chunk.samples:
                continue
            tokens = sampled[sequence.request_id]
            sequence.token_ids += tokens
            self._stats.output_tokens += len(tokens)
            self.policy.charge(sequence, OUTPUT_SERVICE * len(tokens))
            if chunk.drafts:
                num_accepted = max(len(tokens) - 1, 0)
                self.kv_cache.mark_computed(sequence.pages, num_accepted)
                self.kv_cache.trim(sequence.pages)
                self._stats.draft_tokens += len(chunk.drafts)
                self._stats.accepted_tokens += num_accepted
            is_complete = sequence.request_id in complete
            sequence.finish_reason = "stop" if is_complete else finish_reason(sequence, self._max_len)
            if sequence.finish_reason:
                self._finish(sequence)
                finished.append(sequence)
        return finished

    def stats(self) -> EngineStats:
        """Counters since the start and gauges of now; fields of the engine's own are 0.

        `pages_used` are held by live requests, `pages_cached` only kept for later ones; the rest is free.
        """
        cache = self.kv_cache
        return replace(
            self._stats,
            running=(num_running := len(self._running) + len(self._ahead.running)),
            waiting=len(self._sequences) - num_running,
            pages_used=cache.num_pages - cache.num_available,
            pages_cached=cache.tree.num_evictable,
            evicted_pages=cache.num_evicted,
        )

    # -- parts of a step -------------------------------------------------------------------------------------

    def _allocate_for_decode(self, batch: ScheduledBatch, now_s: float) -> None:
        """Give a page to each sequence whose next token starts one, preempting where there is none.

        Before any chunk is made, so that nobody is preempted whose chunk is in the batch.
        """
        for sequence in list(self._running.values()):
            while (
                sequence.status is SequenceStatus.RUNNING
                and sequence.num_computed == len(sequence.block_table) * self.kv_cache.page_size
                and not self.kv_cache.extend(sequence.pages)
            ):
                if self._yield_ahead():
                    continue
                assert len(self._running) > 1, f"{sequence.request_id} fills {len(sequence.block_table)} pages alone"
                victim = max(self._running.values(), key=lambda other: self._followers.preemption_order(other, now_s))
                self._preempt(victim)
                batch.preempted.append(victim)

    def _make_way(self, batch: ScheduledBatch, now_s: float) -> None:
        """Preempt one running sequence for the first in order if that finds no place, or has found no pages."""
        full = len(self._running) >= self.config.max_num_seqs
        waiting = self._waiting.first(now_s) if full or self._out_of_pages else None
        if waiting is None or not (full or waiting is self._out_of_pages):
            return
        followers, preempts = self._followers, self.policy.preempts
        victims = [
            running
            for running in self._running.values()
            if all(preempts(waiting, s, now_s) for s in (running, followers.patron(running, now_s)) if s)
        ]
        if victims:
            victim = max(victims, key=lambda running: followers.preemption_order(running, now_s))
            self._preempt(victim)
            batch.preempted.append(victim)

    def _decode(self, batch: ScheduledBatch, decodes: list[Sequence], budget: StepBudget, now_s: float) -> None:
        """Run the sequences that decode: all of them, or the critical ones and as many others as there is time for.

        Chunks keep the order of the batch, in which the attention planner knows it.
        """
        others = [sequence for sequence in decodes if self._protection.gives_way(sequence, now_s)]
        if budget.limited:
            others.sort(key=lambda sequence: self.policy.order(sequence, now_s))
        budget.take(0, len(decodes) - len(others), gives_way=False)
        left_out = set()
        for sequence in others:
            if budget.room(sequence.num_computed, 1, gives_way=True):
                budget.take(sequence.num_computed, 1, gives_way=True)
            else:
                left_out.add(sequence.number)
        for sequence in decodes:
            if sequence.number not in left_out:
                self._append(batch, sequence, 1)

    def _admit(self, batch: ScheduledBatch, budget: StepBudget, now_s: float) -> None:
        self._out_of_pages = None
        for _ in range(self.config.max_num_seqs + MAX_LOOKUPS_PER_STEP):
            if budget.num_tokens == 0 or len(self._running) >= self.config.max_num_seqs:
                return
            sequence = self._waiting.first(now_s, yielding=not budget.exhausted)
            if sequence is None or sequence in batch.preempted:
                return
            pages = self._ask_for_pages(sequence)
            if pages is None:
                if self._yield_ahead():
                    continue
                self._out_of_pages = sequence
                return
            if isinstance(pages, Blocked) and self._yield_ahead(pages.owner):
                continue  # takes over what is left of the prefix
            self._waiting.remove(sequence)
            if isinstance(pages, Blocked):
                self._followers.block(sequence, self._sequences[pages.owner], pages.num_pages, now_s)
                continue
            self._take_up(sequence, pages)
            self._running[sequence.request_id] = sequence
            if sequence.cached_tokens is None and not sequence.num_outputs:
                sequence.cached_tokens = pages.num_cached
                self._stats.prompt_tokens += len(sequence.token_ids)
                self._stats.cached_tokens += pages.num_cached
                batch.admitted.append(sequence)
            self._run(batch, sequence, budget, now_s)

    def _ask_for_pages(self, sequence: Sequence) -> Allocation | Blocked | None:
        """See `KVCache.admit`."""
        request, hints = sequence.request, sequence.request.hints
        use = NO_USE if sequence.is_ahead else Use(hints.program_id, hints.may_return)
        return self.kv_cache.admit(
            request.request_id, sequence.token_ids, request.salt, reserve=len(self._running), use=use
        )

    def _take_up(self, sequence: Sequence, pages: Allocation) -> None:
        sequence.status, sequence.allocation = SequenceStatus.RUNNING, pages
        self._retainer.admitted(sequence)

    def _run(self, batch: ScheduledBatch, sequence: Sequence, budget: StepBudget, now_s: float) -> None:
        """Put as much of a sequence into the batch as the budget allows."""
        start, left = sequence.num_computed, sequence.num_uncomputed
        gives_way = self._protection.gives_way(sequence, now_s)
        length = budget.room(start, min(left, self.config.max_prefill_chunk or left), gives_way=gives_way)
        if length:
            budget.take(start, length, gives_way=gives_way)
            self._append(batch, sequence, length)

    def _append(self, batch: ScheduledBatch, sequence: Sequence, length: int) -> None:
        """Put the next tokens of a sequence into the batch."""
        start = sequence.num_computed
        samples = length == sequence.num_uncomputed and not sequence.request.prefill_only
        batch.chunks.append(ScheduledChunk(sequence, start, length, samples))
        self.kv_cache.mark_computed(sequence.pages, length)
        num_prompt = len(sequence.request.prompt_ids)
        num_computed = max(0, min(start + length, num_prompt) - start)
        self._stats.ahead_tokens += num_computed if sequence.is_ahead else 0
        self._stats.computed_tokens += 0 if sequence.is_ahead else num_computed
        if (num_new := min(start + length, num_prompt) - max(start, sequence.num_charged)) > 0:
            self.policy.charge(sequence, num_new)
        sequence.num_charged = max(sequence.num_charged, start + length)
        self._wake(sequence, sequence.num_computed // self.kv_cache.page_size)

    def _wake(self, owner: Sequence, num_pages: int | None = None) -> None:
        """Let those take part again who wait for so many pages of `owner`; all of them if it is gone."""
        for follower in self._followers.wake(owner, num_pages):
            self._queue_of(follower).push(follower)

    # -- ahead of time ---------------------------------------------------------------------------------------

    def _run_ahead(self, batch: ScheduledBatch, now_s: float) -> None:
        """Give sequences of class AHEAD what the step leaves; nothing while anybody else waits to be admitted."""
        if not (self._ahead.running or len(self._ahead)):
            return
        ahead, limit = self._ahead.running, self.config.max_num_seqs - len(self._running)
        while len(ahead) > limit:
            self._yield_ahead()
        if len(self._waiting):
            return
        budget = ahead_budget(batch.num_tokens, self.config)
        for running in ahead.values():
            budget -= self._run_some(batch, running, budget)
        for _ in range(len(self._ahead)):
            sequence = self._ahead.first()
            if budget == 0 or len(ahead) >= min(limit, self.config.max_ahead_seqs) or sequence is None:
                return
            if self.kv_cache.covers(sequence.token_ids, sequence.request.salt):
                sequence.cached_tokens = len(sequence.token_ids)
                self._end_prefill(sequence)
                batch.finished.append(sequence)
                continue
            pages = self._ask_for_pages(sequence)
            if pages is None:
                return
            self._ahead.remove(sequence)
            if isinstance(pages, Blocked):
                self._followers.block(sequence, self._sequences[pages.owner], pages.num_pages, now_s)
                continue
            self._take_up(sequence, pages)
            ahead[sequence.request_id] = sequence
            if sequence.cached_tokens is None:
                sequence.cached_tokens = pages.num_cached
                batch.admitted.append(sequence)
            budget -= self._run_some(batch, sequence, budget)

    def _run_some(self, batch: ScheduledBatch, sequence: Sequence, budget: int) -> int:
        """Put up to `budget` tokens of a sequence of class AHEAD into the batch; returns how many."""
        left = sequence.num_uncomputed
        length = min(left, budget, self.config.max_prefill_chunk or left)
        if length:
            self._append(batch, sequence, length)
        return length

    def _yield_ahead(self, request_id: str | None = None) -> bool:
        """Take the pages of a sequence of class AHEAD, of this one or of any; whether there was one.

        Only before any of them has a chunk in the batch.
        """
        sequence = self._ahead.to_yield(request_id)
        if sequence is not None:
            self._give_back_pages(sequence, keep=True)
            sequence.status = SequenceStatus.WAITING
            self._ahead.push(sequence)
            self._retainer.waits(sequence)
        return sequence is not None

    def _end_prefill(self, sequence: Sequence) -> None:
        sequence.finish_reason = "length"
        self._finish(sequence)

    def _queue_of(self, sequence: Sequence) -> WaitingQueue | AheadSequences:
        return self._ahead if sequence.is_ahead else self._waiting

    # -- ends ------------------------------------------------------------------------------------------------

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages; it waits again, with its outputs as part of what is to be prefilled."""
        self._give_back_pages(sequence, keep=True)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self._stats.preemptions += 1
        self._waiting.push(sequence)
        self._retainer.waits(sequence)

    def _finish(self, sequence: Sequence) -> None:
        """End a sequence that has all its tokens."""
        self._retire(sequence)
        self._retainer.ended(sequence)

    def _retire(self, sequence: Sequence, *, keep_pages: bool = True) -> None:
        """End a sequence, whatever it is doing."""
        if sequence.status is SequenceStatus.RUNNING:
            self._give_back_pages(sequence, keep=keep_pages)
        elif sequence.status is SequenceStatus.WAITING:
            self._queue_of(sequence).remove(sequence)
        self._retainer.let_go([sequence.request_id])
        sequence.status = SequenceStatus.FINISHED
        del self._sequences[sequence.request_id]

    def _give_back_pages(self, sequence: Sequence, *, keep: bool) -> None:
        num_wanted = self._followers.num_wanted(sequence)
        self.kv_cache.release(sequence.pages, sequence.token_ids, insert_into_tree=keep, num_wanted=num_wanted)
        sequence.allocation = None
        del (self._ahead.running if sequence.is_ahead else self._running)[sequence.request_id]
        self._wake(sequence)
