"""Which sequences of a step get drafts, and which tokens these are. Pure."""

from __future__ import annotations

from macaw_server.kvcache import KVCache
from macaw_server.scheduler.speculation import NO_GUESS, Drafter, Guess, ProposerFactory, draft_lengths
from macaw_server.scheduler.types import ScheduledBatch, SchedulerConfig, Sequence


class Drafting:
    """Adds drafts to batches.

    Args:
        config: Limits of a step.
        max_len: Of a sequence, in tokens.
        make_proposer: Makes what proposes a request's draft tokens.
    """

    def __init__(self, config: SchedulerConfig, max_len: int, make_proposer: ProposerFactory) -> None:
        self._config = config
        self._max_len = max_len
        self._make_proposer = make_proposer

    def add(self, batch: ScheduledBatch, kv_cache: KVCache, *, ridge: float, reserve: int) -> None:
        """Add drafts to the chunks that decode, where they pay.

        Args:
            batch: Otherwise complete.
            kv_cache: Lends the pages.
            ridge: See `speculation`.
            reserve: Pages that must be available afterwards.
        """
        drafted, guesses = [], []
        for i, chunk in enumerate(batch.chunks):
            if chunk.samples and chunk.length == 1 and (guess := self._guess(chunk.sequence)).token_ids:
                drafted.append((i, chunk))
                guesses.append(guess)
        if not guesses:
            return
        lengths = draft_lengths(
            guesses,
            num_sampled=sum(chunk.samples for chunk in batch.chunks),
            ridge=ridge,
            budget=self._config.max_num_batched_tokens - batch.num_tokens,
        )
        for (i, chunk), guess, length in zip(drafted, guesses, lengths, strict=True):
            if length:
                room = kv_cache.lend(chunk.sequence.pages, length, reserve=reserve)
                batch.chunks[i] = chunk._replace(drafts=tuple(guess.token_ids[:room]))

    def _guess(self, sequence: Sequence) -> Guess:
        """What may come next, cut before a token that would stop the sequence and before its last place.

        Such a token needs no draft: the row before it samples it anyway, and no row follows.
        """
        drafter = sequence.drafter
        if drafter is None:
            drafter = sequence.drafter = Drafter(self._make_proposer(sequence.request))
        elif len(sequence.token_ids) < drafter.resumes_at:
            return NO_GUESS
        sampling = sequence.request.sampling
        left = min(sampling.max_tokens - sequence.num_outputs, self._max_len - len(sequence.token_ids))
        guess = drafter.guess(sequence.token_ids, min(self._config.max_draft_tokens, left - 1))
        stop = next((i for i, token in enumerate(guess.token_ids) if token in sampling.stop_token_ids), None)
        return guess._replace(token_ids=guess.token_ids[:stop])
