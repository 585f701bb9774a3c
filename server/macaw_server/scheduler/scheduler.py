"""Continuous batching: what runs in the next step. Pure: the clock is an argument."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

from macaw_server.engine.types import EngineRequest, EngineStats, FinishReason
from macaw_server.kvcache import Blocked, KVCache
from macaw_server.scheduler.policy import Policy, make_policy
from macaw_server.scheduler.speculation import Drafter, Guess, ProposerFactory, draft_lengths, prompt_lookup
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
    pool.

    - A sequence whose prefix another one is computing is *blocked*: it takes part again when the prefix is
      there, in the same step if it can, and holds up nobody meanwhile.
    - The first sequence in order that finds no pages ends admission: whoever is behind it might take the
      pages it needs for ever. Sequences that run only give pages back, so it gets in.
    - Admission takes free and evictable pages only, and leaves one page for each running sequence to grow
      into. Pages for decoding may be taken from other sequences (`Policy.preemption_order`); nobody is
      admitted in a step that preempts.
    - Drafts get what is left then: tokens of the budget, and pages that are free or can be evicted, less one
      for each running sequence. The pages go back at the end of the step, so speculation neither preempts nor
      holds up anybody.

    Args:
        config: Limits. No sequence gets longer than the page pool, whatever `max_model_len` says.
        kv_cache: Used by this scheduler alone.
        policy: Default: ``app``.
        make_proposer: Makes what proposes a request's draft tokens.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv_cache: KVCache,
        policy: Policy | None = None,
        make_proposer: ProposerFactory = prompt_lookup,
    ) -> None:
        self.config = config
        self.kv_cache = kv_cache
        self.policy = policy or make_policy()
        self._make_proposer = make_proposer
        self._max_len = min(config.max_model_len, kv_cache.num_pages * kv_cache.page_size)
        self._sequences: dict[str, Sequence] = {}
        self._waiting = WaitingQueue(self.policy)
        self._running: dict[str, Sequence] = {}
        self._followers: dict[str, list[tuple[int, int, Sequence]]] = {}  # by owner: heaps by pages needed
        self._num_added = 0
        self._stats = EngineStats(pages_total=kv_cache.num_pages)

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence that has not finished."""
        return bool(self._sequences)

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
        num_prompt, pool_len = len(request.prompt_ids), self.kv_cache.num_pages * self.kv_cache.page_size
        if request.request_id in self._sequences:
            raise ValueError(f"Request id {request.request_id!r} is in use; ids are unique.")
        if not num_prompt:
            raise ValueError(f"Request {request.request_id!r} has an empty prompt; it needs at least 1 token.")
        if num_prompt + 1 > self.config.max_model_len:
            raise ValueError(
                f"Prompt of {num_prompt:,} tokens and one of output are over the model's "
                f"{self.config.max_model_len:,}. Shorten the prompt or serve with a larger --max-model-len."
            )
        if num_prompt + 1 > pool_len:
            raise ValueError(
                f"Prompt of {num_prompt:,} tokens and one of output are over the KV cache's {pool_len:,}. "
                "Shorten the prompt or serve with a larger --kv-memory."
            )
        arrival_s = request.hints.arrival_s
        if not 0 < arrival_s <= now_s:  # not set, or of another clock
            arrival_s = now_s
        self._num_added += 1
        sequence = Sequence(request, arrival_s, self._num_added)
        sequence.finish_reason = self._finish_reason(sequence)
        if sequence.finish_reason:
            sequence.status = SequenceStatus.FINISHED
        else:
            self._sequences[request.request_id] = sequence
            self._waiting.push(sequence)
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
            self._retire(sequence, keep_pages=keep_pages)  # who waits for pages of another one goes before it

    def schedule(self, now_s: float) -> ScheduledBatch:
        """Decide what runs in the next step, which the caller then does, and reports by `update`.

        The batch is empty only when there is no work. Cost: near-linear in the sequences that run, are
        admitted or become blocked; those that merely wait cost nothing.
        """
        batch = ScheduledBatch()
        self._allocate_for_decode(batch, now_s)
        budget = self.config.max_num_batched_tokens
        prefills = []
        for sequence in self._running.values():
            if sequence.num_uncomputed == 1:
                budget -= self._run(batch, sequence, 1)
            else:
                prefills.append(sequence)
        for sequence in sorted(prefills, key=lambda sequence: self.policy.order(sequence, now_s)):
            budget -= self._run(batch, sequence, budget)
        if not batch.preempted:
            self._admit(batch, budget, now_s)
        if self.config.max_draft_tokens:
            self._speculate(batch)
        assert batch.chunks or not self.has_work, f"{len(self._sequences)} sequences and nothing to run"
        return batch

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
        finished = []
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if not chunk.samples or sequence.status is not SequenceStatus.RUNNING:
                continue
            tokens = sampled[sequence.request_id]
            sequence.token_ids += tokens
            self._stats.output_tokens += len(tokens)
            if chunk.drafts:
                num_accepted = max(len(tokens) - 1, 0)
                self.kv_cache.mark_computed(sequence.pages, num_accepted)
                self.kv_cache.trim(sequence.pages)
                self._stats.draft_tokens += len(chunk.drafts)
                self._stats.accepted_tokens += num_accepted
            is_complete = sequence.request_id in complete
            sequence.finish_reason = "stop" if is_complete else self._finish_reason(sequence)
            if sequence.finish_reason:
                self._retire(sequence)
                finished.append(sequence)
        return finished

    def stats(self) -> EngineStats:
        """Counters since the start and gauges of now; fields of the engine's own are 0.

        `pages_used` are held by live requests, `pages_cached` only kept for later ones; the rest is free.
        """
        cache = self.kv_cache
        return replace(
            self._stats,
            running=len(self._running),
            waiting=len(self._sequences) - len(self._running),
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
                assert len(self._running) > 1, f"{sequence.request_id} fills {len(sequence.block_table)} pages alone"
                victim = max(self._running.values(), key=lambda other: self.policy.preemption_order(other, now_s))
                self._preempt(victim)
                batch.preempted.append(victim)

    def _admit(self, batch: ScheduledBatch, budget: int, now_s: float) -> None:
        for _ in range(self.config.max_num_seqs + MAX_LOOKUPS_PER_STEP):
            if budget == 0 or len(self._running) == self.config.max_num_seqs:
                return
            sequence = self._waiting.first(now_s)
            if sequence is None:
                return
            pages = self.kv_cache.admit(
                sequence.request_id, sequence.token_ids, sequence.request.salt, reserve=len(self._running)
            )
            if pages is None:
                return
            self._waiting.remove(sequence)
            if isinstance(pages, Blocked):
                sequence.status = SequenceStatus.BLOCKED
                heapq.heappush(
                    self._followers.setdefault(pages.owner, []), (pages.num_pages, sequence.number, sequence)
                )
                continue
            sequence.status, sequence.allocation = SequenceStatus.RUNNING, pages
            self._running[sequence.request_id] = sequence
            if sequence.cached_tokens is None and not sequence.num_outputs:
                sequence.cached_tokens = pages.num_cached
                self._stats.prompt_tokens += len(sequence.token_ids)
                self._stats.cached_tokens += pages.num_cached
                batch.admitted.append(sequence)
            budget -= self._run(batch, sequence, budget)

    def _speculate(self, batch: ScheduledBatch) -> None:
        """Add drafts to the chunks that decode, where they pay."""
        decodes = [(i, c) for i, c in enumerate(batch.chunks) if c.samples and c.length == 1]
        lengths = draft_lengths(
            guesses := [self._guess(chunk.sequence) for _, chunk in decodes],
            num_sampled=sum(chunk.samples for chunk in batch.chunks),
            ridge=self.config.ridge,
            budget=self.config.max_num_batched_tokens - batch.num_tokens,
        )
        for (i, chunk), guess, length in zip(decodes, guesses, lengths, strict=True):
            if length:
                room = self.kv_cache.lend(chunk.sequence.pages, length, reserve=len(self._running))
                batch.chunks[i] = chunk._replace(drafts=tuple(guess.token_ids[:room]))

    def _guess(self, sequence: Sequence) -> Guess:
        """What may come next, cut before a token that would stop the sequence and before its last place.

        Such a token needs no draft: the row before it samples it anyway, and no row follows.
        """
        sampling = sequence.request.sampling
        if sequence.drafter is None:
            sequence.drafter = Drafter(self._make_proposer(sequence.request))
        left = min(sampling.max_tokens - sequence.num_outputs, self._max_len - len(sequence.token_ids))
        guess = sequence.drafter.guess(sequence.token_ids, min(self.config.max_draft_tokens, left - 1))
        stop = next((i for i, token in enumerate(guess.token_ids) if token in sampling.stop_token_ids), None)
        return guess._replace(token_ids=guess.token_ids[:stop])

    def _run(self, batch: ScheduledBatch, sequence: Sequence, budget: int) -> int:
        """Put as much of a sequence into the batch as the budget allows; returns the number of tokens."""
        start, left = sequence.num_computed, sequence.num_uncomputed
        length = min(left, budget, self.config.max_prefill_chunk or left)
        if length == 0:
            return 0
        batch.chunks.append(ScheduledChunk(sequence, start, length, samples=length == left))
        self.kv_cache.mark_computed(sequence.pages, length)
        num_prompt = len(sequence.request.prompt_ids)
        self._stats.computed_tokens += max(0, min(start + length, num_prompt) - start)
        self._wake_followers(sequence, sequence.num_computed // self.kv_cache.page_size)
        return length

    def _wake_followers(self, owner: Sequence, num_pages: int | None = None) -> None:
        """Let those take part again who wait for so many pages of `owner`; all of them if it is gone."""
        followers = self._followers.get(owner.request_id)
        if followers is None:
            return
        while followers and (num_pages is None or followers[0][0] <= num_pages):
            follower = heapq.heappop(followers)[-1]
            if follower.status is SequenceStatus.BLOCKED:
                follower.status = SequenceStatus.WAITING
                self._waiting.push(follower)
        if not followers:
            del self._followers[owner.request_id]

    # -- ends ------------------------------------------------------------------------------------------------

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        sampling, num_outputs = sequence.request.sampling, sequence.num_outputs
        if num_outputs > sampling.min_tokens and sequence.token_ids[-1] in sampling.stop_token_ids:
            return "stop"
        if num_outputs >= sampling.max_tokens or len(sequence.token_ids) >= self._max_len:
            return "length"
        return None

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages; it waits again, with its outputs as part of what is to be prefilled."""
        self._give_back_pages(sequence, keep=True)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self._stats.preemptions += 1
        self._waiting.push(sequence)

    def _retire(self, sequence: Sequence, *, keep_pages: bool = True) -> None:
        """End a sequence, whatever it is doing."""
        if sequence.status is SequenceStatus.RUNNING:
            self._give_back_pages(sequence, keep=keep_pages)
        elif sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._sequences[sequence.request_id]

    def _give_back_pages(self, sequence: Sequence, *, keep: bool) -> None:
        followers = self._followers.get(sequence.request_id, ())
        wanted = [num_pages for num_pages, _, other in followers if other.status is SequenceStatus.BLOCKED]
        self.kv_cache.release(
            sequence.pages, sequence.token_ids, insert_into_tree=keep, num_wanted=max(wanted, default=0)
        )
        sequence.allocation = None
        del self._running[sequence.request_id]
        self._wake_followers(sequence)
