"""A step that was launched, and whose tokens may still be on their way."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from macaw_kernels.transfers import upload
from macaw_server.engine.runner import Chunk
from macaw_server.engine.sampler import Choices, Row, Sampled
from macaw_server.scheduler import ScheduledBatch, ScheduledChunk, SequenceStatus, StepFeatures

if TYPE_CHECKING:
    from macaw_server.engine.grammar import Masks


class Flight(NamedTuple):
    """A launched step.

    Attributes:
        batch: What runs.
        features: What its time depends on.
        choices: A token for each row that samples; or the error that says why there is none; None if nothing ran.
    """

    batch: ScheduledBatch
    features: StepFeatures
    choices: Choices | Exception | None

    def tokens_of(self, ahead: ScheduledBatch) -> Tensor:
        """The tokens that the batch after this one runs, ``[num_tokens]`` int64 on the device."""
        assert isinstance(self.choices, Choices), "nothing follows a step that failed"
        tokens = self.choices.tokens
        row_of = {chunk.sequence.request_id: i for i, chunk in enumerate(sampling(self.batch))}
        rows = np.array([row_of[chunk.sequence.request_id] for chunk in ahead.chunks])
        return tokens.index_select(0, upload(rows, tokens.device)).clamp(min=0)  # -1 fails when it is read

    def result(self) -> dict[str, Seq[Sampled]]:
        """The choices, as far as drafts hold, by id of the sequences that still run; waits for the device.

        Raises:
            Exception: The step failed.
        """
        if isinstance(self.choices, Exception):
            raise self.choices
        if self.choices is None:
            return {}
        choices = iter(self.choices.result())
        verified = {c.sequence: _verified(c.drafts, list(islice(choices, c.num_samples))) for c in sampling(self.batch)}
        return {s.request_id: chosen for s, chosen in verified.items() if s.status is SequenceStatus.RUNNING}


def sampling(batch: ScheduledBatch) -> list[ScheduledChunk]:
    """The chunks that sample, in the order of their rows."""
    return [chunk for chunk in batch.chunks if chunk.samples]


def chunks(batch: ScheduledBatch) -> list[Chunk]:
    """What the model runner computes; tokens that are not known yet are 0."""
    return [
        Chunk((0,) * c.length if batch.ahead else c.token_ids, c.start, c.sequence.block_table, c.num_samples)
        for c in batch.chunks
    ]


def rows(batch: ScheduledBatch, chunk: ScheduledChunk, masks: Masks | None) -> Iterator[Row]:
    """The rows of a chunk that samples, one after each number of its drafts."""
    sequence, drafts = chunk.sequence, chunk.drafts
    params, num_prompt = sequence.request.sampling, len(sequence.request.prompt_ids)
    for i in range(chunk.num_samples):
        mask = None if masks is None else masks[i]
        yield Row(params, sequence.token_ids, num_prompt, drafts[:i], mask, chunk.length if batch.ahead else 0)


def _verified(drafts: Seq[int], choices: Seq[Sampled]) -> Seq[Sampled]:
    """The choices up to the first that is not its draft; what follows was computed after a wrong token."""
    num_right = next((i for i, (d, c) in enumerate(zip(drafts, choices, strict=False)) if d != c.token), len(drafts))
    return choices[: num_right + 1]
