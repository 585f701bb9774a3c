"""A stand-in for the engine: runs batches on the memory model and samples by a hash of all tokens so far."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq

from macaw_server.engine.types import CallClass, CallHints, EngineRequest, SamplingParams
from macaw_server.kvcache import Eviction, KVCache
from macaw_server.scheduler import (
    Policy,
    ProposerFactory,
    ScheduledBatch,
    ScheduledChunk,
    Scheduler,
    SchedulerConfig,
    Sequence,
    SequenceStatus,
    StepTimeModel,
    make_policy,
    prompt_lookup,
)
from server.kvcache.kv_memory import KVMemory, prefix_hashes

STOP = 9


def request(
    request_id: str,
    prompt: list[int],
    max_tokens: int = 4,
    *,
    salt: str = "",
    output: tuple[int, ...] = (),
    stop: frozenset[int] = frozenset(),
    min_tokens: int = 0,
    call_class: CallClass = CallClass.LATENCY,
    prefill_only: bool = False,
    **hints,
) -> EngineRequest:
    sampling = SamplingParams(max_tokens, stop_token_ids=stop, min_tokens=min_tokens)
    hints = CallHints(call_class=call_class, **hints)
    return EngineRequest(request_id, prompt, sampling, salt, hints, list(output), prefill_only)


def sample(tokens: list[int]) -> int:
    """Tokens of a small alphabet, so that outputs meet prompts; a tenth of them end the sequence."""
    return (0, 0, 0, 1, 1, 2, 2, 3, 3, STOP)[prefix_hashes("sample", tokens)[-1] % 10]


def generate(asked: EngineRequest, max_len: int, sampler: Callable[[list[int]], int] = sample) -> list[int]:
    """The outputs that a request must get, whatever happens around it."""
    tokens, sampling = asked.prompt_ids + asked.output_ids, asked.sampling
    while not asked.prefill_only:
        output = tokens[len(asked.prompt_ids) :]
        if output and output[-1] in sampling.stop_token_ids and len(output) > sampling.min_tokens:
            return output
        if len(output) >= sampling.max_tokens or len(tokens) >= max_len:
            return output
        tokens = [*tokens, sampler(tokens)]
    return []


class NoisyOracle:
    """Proposes what the sampler will choose, each token spoilt with some probability."""

    def __init__(self, noise: float, sampler: Callable[[list[int]], int] = sample) -> None:
        self.noise = noise
        self.sampler = sampler
        self.random = random.Random(0)

    def propose(self, token_ids: Seq[int], limit: int) -> list[int]:
        tokens = list(token_ids)
        for _ in range(limit):
            tokens.append(self.sampler(tokens) if self.random.random() >= self.noise else self.random.randrange(4))
        return tokens[len(token_ids) :]


class EngineModel:
    """A scheduler and its memory; every step is checked for wrong reads and for work done twice."""

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 2,
        *,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        max_model_len: int = 100,
        max_prefill_chunk: int | None = None,
        max_draft_tokens: int = 0,
        ridge: float = 1e6,
        latency_slowdown: float = 1e6,
        step_time: StepTimeModel | None = None,
        max_ahead_seqs: int = 8,
        ahead_rows: int = 0,
        make_proposer: ProposerFactory = prompt_lookup,
        policy: str | Policy = "fcfs",
        sampler: Callable[[list[int]], int] = sample,
        cache: KVCache | None = None,
        overlap: bool = False,
        eviction: Eviction = "value",
        prefix_caching: bool = True,
        single_flight: bool = True,
    ) -> None:
        config = SchedulerConfig(
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            max_prefill_chunk,
            max_draft_tokens,
            ridge,
            latency_slowdown,
            max_ahead_seqs,
            ahead_rows,
        )
        self.cache = cache or KVCache(
            num_pages, page_size, eviction=eviction, prefix_caching=prefix_caching, single_flight=single_flight
        )
        self.computes_once = prefix_caching and single_flight
        policy = make_policy(policy) if isinstance(policy, str) else policy
        self.scheduler = Scheduler(config, self.cache, policy, make_proposer, step_time)
        self.memory = KVMemory(self.cache)
        self.sampler = sampler
        self.overlap = overlap
        self.ahead: ScheduledBatch | None = None
        self.num_ahead = 0
        self.now_s = 1.0
        self.sequences: dict[str, Sequence] = {}
        self.admitted: set[str] = set()
        self.finished: list[str] = []

    @property
    def max_len(self) -> int:
        return min(self.scheduler.config.max_model_len, self.cache.num_pages * self.cache.page_size)

    def add(self, request_id: str, prompt: list[int], max_tokens: int = 4, **kwargs) -> Sequence:
        sequence = self.scheduler.add(request(request_id, prompt, max_tokens, **kwargs), self.now_s)
        self.sequences[request_id] = sequence
        if sequence.finish_reason:
            self.finished.append(request_id)
        return sequence

    def step(self) -> ScheduledBatch:
        """A round; with overlap the batch after this one runs before the tokens of this one are reported."""
        batch = self.ahead or self._schedule()
        self.now_s += 0.01
        self.cache.check()
        sampled = {c.sequence.request_id: self._sample(c) for c in batch.chunks if c.samples}
        self.ahead = self.scheduler.schedule_ahead() if self.overlap else None
        if self.ahead is not None:
            self._run_ahead(self.ahead, sampled)
        self.finished += [sequence.request_id for sequence in self.scheduler.update(batch, sampled)]
        if self.ahead is not None:
            self.scheduler.confirm(self.ahead)
        self.memory.ready_prefixes()
        self.cache.check()
        for sequence in (chunk.sequence for chunk in batch.chunks if chunk.drafts):
            if sequence.status is SequenceStatus.RUNNING:  # no page is kept for what was rejected
                assert len(sequence.block_table) == -(-sequence.num_computed // self.cache.page_size)
                assert sequence.num_uncomputed == 1
        return batch

    def _schedule(self) -> ScheduledBatch:
        before = self.memory.ready_prefixes()
        running = {name for name, sequence in self.sequences.items() if sequence.status is SequenceStatus.RUNNING}
        batch = self.scheduler.schedule(self.now_s)
        held = self.memory.prefixes()  # what was ready before and has not been evicted since
        self._run(batch, {end: page for end, page in before.items() if held.get(end) == page}, running)
        return batch

    def _run_ahead(self, batch: ScheduledBatch, sampled: dict[str, list[int]]) -> None:
        """Each sequence that runs takes part with the token that it is about to get, or is sure to end with it."""
        self.num_ahead += 1
        assert batch.chunks
        for sequence in (chunk.sequence for chunk in batch.chunks):
            assert sequence.status is SequenceStatus.RUNNING
            tokens = sequence.token_ids + sampled[sequence.request_id]
            hashes = prefix_hashes(sequence.request.salt, tokens)
            self.memory.check(sequence.block_table, hashes, len(tokens) - 1)
            self.memory.write(sequence.block_table, hashes, len(tokens) - 1, len(tokens))

    def _sample(self, chunk: ScheduledChunk) -> list[int]:
        """The drafts that are right, and the token after them."""
        tokens, choices = list(chunk.sequence.token_ids), []
        for draft in (*chunk.drafts, None):
            choices.append(self.sampler(tokens))
            tokens.append(choices[-1])
            if choices[-1] != draft:
                break
        return choices

    def run(self, max_steps: int = 500) -> list[ScheduledBatch]:
        """Steps until there is no work; fails if that takes more than `max_steps`."""
        batches = []
        while self.scheduler.has_work:
            assert len(batches) < max_steps, f"work left after {max_steps} steps"
            batches.append(self.step())
        return batches

    def _run(self, batch: ScheduledBatch, ready: dict[int, int], running: set[str]) -> None:
        config, size = self.scheduler.config, self.cache.page_size
        assert batch.num_tokens <= config.max_num_batched_tokens
        assert len({chunk.sequence.request_id for chunk in batch.chunks}) == len(batch.chunks)
        assert self.scheduler.stats().running <= config.max_num_seqs
        for chunk in batch.chunks:
            sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.length
            tokens = sequence.token_ids
            assert len(chunk.drafts) <= (config.max_draft_tokens if chunk.samples else 0)
            assert not set(chunk.drafts) & sequence.request.sampling.stop_token_ids
            assert 1 <= chunk.length <= (config.max_prefill_chunk or chunk.length)
            assert chunk.samples == (end == len(tokens) and not sequence.request.prefill_only)
            hashes = prefix_hashes(sequence.request.salt, [*tokens, *chunk.drafts])
            self.memory.check(sequence.block_table, hashes, start)  # computed before, or by an earlier chunk
            self.memory.write(sequence.block_table, hashes, start, end + len(chunk.drafts))
            for i_page in range(start // size, min(end // size, (len(tokens) - 1) // size)):
                content, page = hashes[(i_page + 1) * size - 1], sequence.block_table[i_page]
                if self.computes_once:
                    assert ready.setdefault(content, page) == page, f"{sequence.request_id} recomputes page {page}"
                elif sequence.request_id not in running:  # who runs goes on with what others have by now, too
                    assert ready.get(content, page) == page, f"{sequence.request_id} does not find page {page}"
        admitted = {sequence.request_id for sequence in batch.admitted}
        assert not admitted & self.admitted, "cached_tokens reported twice"
        self.admitted |= admitted
        for preempted in batch.preempted:
            assert preempted not in [chunk.sequence for chunk in batch.chunks]

    def check_finished(self, sequence: Sequence) -> None:
        """Assert that a sequence ended as it would have ended alone."""
        expected = generate(sequence.request, self.max_len, self.sampler)
        output = sequence.token_ids[len(sequence.request.prompt_ids) :]
        assert output == expected, f"{sequence.request_id}: {output}, expected {expected}"
        sampling = sequence.request.sampling
        stopped = bool(output) and len(output) > sampling.min_tokens and output[-1] in sampling.stop_token_ids
        assert sequence.finish_reason == ("stop" if stopped else "length")

    def check_no_leak(self) -> None:
        """Assert that all pages are there when nothing runs."""
        assert not self.scheduler.has_work
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
        self.scheduler.let_go({*self.sequences, *(s.request.hints.program_id for s in self.sequences.values())})
        assert self.cache.retention is None or self.cache.retention.num_claims == 0, "somebody still has a claim"
        assert not any(node.claims for node in self.cache.tree.nodes())
        self.cache.pool.free(self.cache.tree.evict(self.cache.num_pages))
        assert self.cache.pool.num_free == self.cache.num_pages
        assert self.cache.tree.salts == set()
