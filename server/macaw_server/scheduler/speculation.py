"""Speculative decoding: which drafts are worth a place in the step. Pure.

A step verifies the drafts of a sequence as it computes them: row ``i`` gives the token that the model chooses after
``i`` drafts. The choice depends on (seed, index, distribution) only, so drafts are accepted while they *are* the
choice; the output is the same as without speculation, sampled or greedy.

What a draft costs: a decode step takes about as long as reading the weights, plus the arithmetic of each row; the
**ridge** (of the roofline: Williams, Waterman & Patterson 2009) is the number of rows at which the second equals the
first. In that unit a step of ``n`` rows costs ``ridge + n``.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

from macaw_server.engine.types import EngineRequest
from macaw_server.scheduler.prompt_lookup import PromptLookup


class Proposer(Protocol):
    """Guesses how one sequence goes on. May be wrong, and is not told what came of its guess."""

    def propose(self, token_ids: Seq[int], limit: int) -> list[int]:
        """At most `limit` tokens to follow `token_ids`, which is what the last call saw and more."""
        ...


ProposerFactory = Callable[[EngineRequest], Proposer]


def prompt_lookup(_request: EngineRequest) -> Proposer:
    """The default factory."""
    return PromptLookup()


class Guess(NamedTuple):
    """A proposal: the tokens, and the probability that one is right if all before it are."""

    token_ids: list[int]
    acceptance: float


NO_GUESS = Guess([], 0.0)


class Drafter:
    """A proposer and its record on one sequence.

    Every guess is held against the tokens that came, whether or not it was run: so a proposer that is not trusted
    earns trust at no cost, and nothing is ever run just to try. While it has nothing to say or is wrong it is asked
    ever more rarely, and after one token that it foresaw in every step again.

    Attributes:
        resumes_at: It makes no guess before the sequence has so many tokens.
    """

    __slots__ = ("_acceptance", "_guess", "_position", "_proposer", "_rest", "resumes_at")

    PRIOR = 0.25
    WEIGHT = 0.2
    """Of the newest observation in the running mean: a dozen tokens tell copying from writing."""
    MAX_REST = 8
    """Steps between two questions at most: what a copy may be noticed too late."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self._acceptance = self.PRIOR
        self._guess: list[int] = []
        self._position = 0
        self._rest = 1
        self.resumes_at = 0

    def guess(self, token_ids: list[int], limit: int) -> Guess:
        """Take note of what came since the last guess, and make the next, unless it is too early for one."""
        end = len(token_ids)
        if end < self.resumes_at:
            return NO_GUESS
        hits = 0
        for guessed, token in zip(self._guess, token_ids[self._position :], strict=False):
            self._acceptance += self.WEIGHT * ((guessed == token) - self._acceptance)
            if guessed != token:
                break
            hits += 1
        self._guess = self._proposer.propose(token_ids, limit)[:limit]
        self._position = end
        self._rest = 1 if hits else min(2 * self._rest, self.MAX_REST)
        self.resumes_at = end + self._rest
        return Guess(self._guess, self._acceptance)


def draft_lengths(guesses: Seq[Guess], *, num_sampled: int, ridge: float, budget: int) -> list[int]:
    """How many tokens of each guess to run, for the most expected tokens per time in this step.

    The `j`-th draft of a guess brings ``acceptance ** j`` tokens and costs one row. The surest go first, as long as
    they bring more per row than the step does without them: that maximises
    ``(num_sampled + tokens brought) / (ridge + num_sampled + rows)``. A full batch asks for sure drafts, and a
    sequence whose guesses fail runs none.

    Args:
        guesses: Of the sequences that decode.
        num_sampled: Sequences that get a token in this step in any case.
        ridge: See the module.
        budget: Drafts that may be run in all.
    """
    tokens, cost = float(num_sampled), ridge + num_sampled
    chances = sorted(
        (
            (chance, i)
            for i, guess in enumerate(guesses)
            for j in range(1, len(guess.token_ids) + 1)
            if (chance := guess.acceptance**j) * cost > tokens
        ),
        reverse=True,
    )
    lengths = [0] * len(guesses)
    for chance, i in chances[:budget]:
        if chance * cost <= tokens:
            break
        lengths[i] += 1
        tokens += chance
        cost += 1
    return lengths
