"""The step after the one in flight, decided before the tokens of that one are known. Pure.

While a device computes step N, the host can schedule and launch step N+1: its input tokens are N's result and need not
leave the device. That is right wherever N's tokens decide no more than who still takes part: every sequence that runs
decodes, and nothing that is done to its next token depends on what the tokens before it are. A sequence that turns out
to have ended at N computes one token in vain, behind its own and into a page that is its own.
"""

from __future__ import annotations

from collections.abc import Collection

from macaw_server.engine.types import SamplingParams
from macaw_server.kvcache import KVCache
from macaw_server.scheduler.types import ScheduledBatch, ScheduledChunk, Sequence


def look_ahead(
    running: Collection[Sequence], kv_cache: KVCache, *, max_len: int, anybody_waits: bool
) -> ScheduledBatch | None:
    """The batch after the one in flight, or None where that has to wait for the tokens.

    Nothing counts as computed yet: that is for when a sequence is known to go on.

    Args:
        running: All sequences that hold pages; the batch in flight samples one token for each of them.
        kv_cache: Gives the pages for the new tokens; nobody is preempted for them.
        max_len: Of a sequence, in tokens.
        anybody_waits: A place that becomes free is wanted: no step ahead of an end that is certain.
    """
    batch = ScheduledBatch(ahead=True)
    for sequence in running:
        sampling, next_len = sequence.request.sampling, len(sequence.token_ids) + 1
        if sequence.num_uncomputed or sequence.request.prefill_only or not _foreseeable(sampling):
            return None
        if sequence.num_outputs + 1 < sampling.max_tokens and next_len < max_len:
            batch.chunks.append(ScheduledChunk(sequence, next_len - 1, 1, samples=True))
    if not batch.chunks or (anybody_waits and len(batch.chunks) < len(running)):
        return None
    for chunk in batch.chunks:
        if not kv_cache.lend(chunk.sequence.pages, 1, reserve=0):
            for other in batch.chunks:
                kv_cache.trim(other.sequence.pages)
            return None
    return batch


def _foreseeable(sampling: SamplingParams) -> bool:
    """Whether a token can be chosen without the host's knowing the tokens before it."""
    penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1.0
    return sampling.grammar is None and not any(penalties)
