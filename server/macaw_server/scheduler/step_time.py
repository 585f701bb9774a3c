"""How long a step takes: a line through what it does, fitted while the engine runs. Pure.

A step pays a fixed price (weights read once, overhead), and then for each token that goes through the layers, each row
of logits, each K/V entry read and each attention score computed. The first tokens hide behind the reading of the
weights, so the line has a knee: those beyond `KNEE` may cost more. All coefficients are non-negative, so that more work
never looks cheaper, whatever the data.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from macaw_server.scheduler.least_squares import NormalEquations, solve_nonnegative
from macaw_server.scheduler.types import ScheduledBatch


class StepFeatures(NamedTuple):
    """What the time of a step depends on.

    Attributes:
        num_tokens: New tokens run, drafts included.
        num_samples: Rows of logits.
        num_kv_tokens: Distinct KV tokens read: a page that several sequences share counts once.
        num_scores: Pairs of a new token and a token that it attends to, shared or not.
    """

    num_tokens: int = 0
    num_samples: int = 0
    num_kv_tokens: int = 0
    num_scores: int = 0

    def plus(self, start: int, length: int, num_samples: int = 0, num_kv_tokens: int | None = None) -> StepFeatures:
        """With one more chunk in the step.

        Args:
            start: Position of its first token.
            length: Number of tokens.
            num_samples: Rows of logits.
            num_kv_tokens: Tokens it reads that nobody else in the step does; default: all of its context.
        """
        return StepFeatures(
            self.num_tokens + length,
            self.num_samples + num_samples,
            self.num_kv_tokens + (start + length if num_kv_tokens is None else num_kv_tokens),
            self.num_scores + length * start + length * (length + 1) // 2,
        )


def step_features(batch: ScheduledBatch) -> StepFeatures:
    """Of a batch that is scheduled and not yet reported back; O(chunks + distinct nodes of the radix tree).

    What counts as shared is what the radix tree holds once. The attention planner shares it where that pays, so it may
    read more; scores tell the model of the rest.
    """
    num_tokens = num_samples = num_kv_tokens = num_scores = 0
    seen: dict[int, int] = {}  # node -> tokens from the root to its end
    for chunk in batch.chunks:
        length = chunk.length + len(chunk.drafts)
        context = chunk.start + length
        pages = chunk.sequence.pages
        num_tokens += length
        num_samples += chunk.num_samples
        num_scores += length * chunk.start + length * (length + 1) // 2
        node = pages.node if pages.node.owner is None else pages.node.parent  # pending pages are its own
        path = []
        while node is not None and id(node) not in seen:
            path.append(node)
            node = node.parent
        before = depth = 0 if node is None else seen[id(node)]
        for node in reversed(path):
            depth += len(node.tokens)
            seen[id(node)] = depth
        # A new node is read up to the context at most; what is behind the tree is the sequence's own.
        num_kv_tokens += context - before
    return StepFeatures(num_tokens, num_samples, num_kv_tokens, num_scores)


class Coefficients(NamedTuple):
    """Milliseconds per step, and per unit of each feature; `beyond` comes on top for tokens beyond the knee."""

    fixed: float
    token: float
    sample: float
    kv_token: float
    score: float
    beyond: float = 0.0


KNEE = 16
"""Tokens of a step: a tile of rows of the CPU kernels."""
PRIOR = Coefficients(fixed=5.0, token=0.6, sample=0.5, kv_token=1.5e-3, score=7e-5)
"""Before data: a model of 135M parameters in bfloat16 on two cores. The first step already sets the scale."""


class _SizeClass:
    """What steps of about the same size have told.

    Attributes:
        seen: Steps of all classes up to its last change.
        error: Running mean of the relative error of predictions, outliers cut.
        num_observed: Steps of this class.
    """

    __slots__ = ("error", "num_observed", "seen", "sums")

    def __init__(self, seen: int) -> None:
        self.seen = seen
        self.error = 0.1
        self.num_observed = 0
        self.sums = NormalEquations(len(Coefficients._fields))

    def forget(self, num_observed: int, memory: int) -> None:
        """Let it fade for the steps of other classes that came since."""
        if num_observed > self.seen:
            self.sums.scale((1 - 1 / memory) ** (num_observed - self.seen))
            self.seen = num_observed


class StepTimeModel:
    """Predicts the time of a step from its features; learns from every step.

    Weighted recursive least squares on relative errors, in information form:

    - Steps are put into classes by size (powers of two of tokens), each with its own sums and its own forgetting.
      An hour of decoding does not wash out what is known of prefills, and thousands of small steps do not outvote
      a few large ones.
    - The influence of a step is bounded (Huber): one that was stalled counts about as much as one that was a
      little slow.
    - When everything gets slower or faster for good, the past is rescaled within some ten steps.
    - Where data says nothing of a coefficient, it keeps the prior's proportion to the others.

    Args:
        prior: Coefficients before data; their proportions are what counts later on.

    Raises:
        ValueError: The prior has a negative coefficient, or predicts that steps take no time.
    """

    MEMORY = 64
    """Steps of a class after which an older one counts 1/e."""
    LONG_MEMORY = 4096
    """The same for steps of other classes."""
    PRIOR_WEIGHT = 1e-4
    """Steps' worth of data that the prior's proportions count for."""
    TAIL = 2.0
    """A step counts fully up to this many times the usual relative error."""
    NUM_TRUSTED = 4
    """First steps of a class: they tell how wrong the line is there, not how noisy the machine."""
    DRIFT = 0.2
    """Mean logarithm of observed over predicted time, of late, that is a lasting change."""
    FIT_EVERY = 16
    """Observed steps to a fit, once there are some."""

    def __init__(self, prior: Coefficients = PRIOR) -> None:
        if min(prior) < 0 or max(prior) <= 0:
            raise ValueError(f"{prior} has to have coefficients of at least 0, and one above: steps take time.")
        self._prior = prior
        self._coefficients = prior
        self._classes: dict[int, _SizeClass] = {}
        self._num_observed = 0
        self._num_fitted = 0
        self._drift = 0.0

    @property
    def coefficients(self) -> Coefficients:
        """The line as it is now."""
        self._fit()
        return self._coefficients

    @property
    def error(self) -> float:
        """Mean relative error of predictions over the classes, outliers cut; 0 before there is any."""
        known = [c.error for c in self._classes.values() if c.num_observed > self.NUM_TRUSTED]
        return sum(known) / len(known) if known else 0.0

    @property
    def num_observed(self) -> int:
        """Steps that were observed."""
        return self._num_observed

    def observe(self, features: StepFeatures, step_time_ms: float) -> None:
        """Learn from a step: some 20 microseconds.

        Raises:
            ValueError: The time is not positive.
        """
        if not step_time_ms > 0:
            raise ValueError(f"A step of {step_time_ms} ms was observed; times are positive.")
        predicted = self.predict(features)
        known = self._classes.setdefault(features.num_tokens.bit_length(), _SizeClass(self._num_observed))
        known.forget(self._num_observed, self.LONG_MEMORY)
        known.sums.scale(1 - 1 / self.MEMORY)
        weight = self._weight(known, step_time_ms / predicted)
        unit = min(max(predicted, step_time_ms / 2), step_time_ms * 2)
        beyond = max(0, features.num_tokens - KNEE)
        known.sums.add([1 / unit, *(n / unit for n in features), beyond / unit], step_time_ms / unit, weight)
        self._num_observed += 1
        known.num_observed += 1
        known.seen = self._num_observed

    def predict(self, features: StepFeatures) -> float:
        """Milliseconds that such a step takes."""
        if self._num_observed - self._num_fitted >= min(self.FIT_EVERY, 1 + self._num_fitted):
            self._fit()
        c = self._coefficients
        time_ms = (
            c.fixed
            + c.token * features.num_tokens
            + c.sample * features.num_samples
            + c.kv_token * features.num_kv_tokens
            + c.score * features.num_scores
            + c.beyond * max(0, features.num_tokens - KNEE)
        )
        return max(time_ms, 1e-3)

    def to_dict(self) -> dict[str, Any]:
        """What it predicts by, as JSON can hold it."""
        return {"coefficients": self.coefficients._asdict(), "error": self.error, "num_observed": self._num_observed}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> StepTimeModel:
        """A model that predicts what the saved one did, and learns anew from there.

        Raises:
            ValueError: This is not what `to_dict` makes.
        """
        try:
            return cls(Coefficients(**{name: float(value) for name, value in saved["coefficients"].items()}))
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{saved!r} is not a step-time model; `macaw simulate fit` makes one.") from e

    def _weight(self, known: _SizeClass, ratio: float) -> float:
        """What an observation counts, by how far it is from the line; `ratio` is observed over predicted."""
        if known.num_observed < self.NUM_TRUSTED:
            return 1.0
        error, tail = max(ratio, 1 / ratio) - 1, self.TAIL * known.error
        known.error = max(0.01, known.error + (min(error, 2 * tail) - known.error) / 16)
        self._drift += (min(max(math.log(ratio), -0.5), 0.5) - self._drift) / 16
        if abs(self._drift) > self.DRIFT:
            for each in self._classes.values():
                each.sums.rescale(math.exp(self._drift))
            self._drift = 0.0
            self._num_fitted = 0
        return min(1.0, tail / error) if error > 0 else 1.0

    def _fit(self) -> None:
        if self._num_observed == self._num_fitted:
            return
        self._num_fitted = self._num_observed
        sums = NormalEquations(len(self._prior))
        for known in self._classes.values():
            known.forget(self._num_observed, self.LONG_MEMORY)
            sums.merge(known.sums)
        scale = sums.scalar_fit(self._prior)
        self._coefficients = Coefficients(*solve_nonnegative(sums, [scale * c for c in self._prior], self.PRIOR_WEIGHT))
