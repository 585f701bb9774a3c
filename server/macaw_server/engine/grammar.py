"""Grammars of constrained decoding: which tokens may come next, as bit masks. By llguidance; no torch.

A grammar is llguidance's own form of a JSON schema, a regular expression or a Lark grammar; `service.constraints` makes
it and checks it. Masks are packed: bit ``i % 32`` of word ``i // 32`` says whether token ``i`` is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray
from tokenizers import Tokenizer

from macaw_server.engine.types import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Masks = NDArray[np.int32]

LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000, step_lexer_fuel=100_000, max_lexer_states=50_000, verbose_errors=False
)
"""Half of llguidance's own or less: all sequences of a batch wait for the slowest grammar in it."""

_EXCERPT = re.compile(r"\s*(\d+ \|.*|\^|<non-verbose/>)")
_MAX_ERROR_LEN = 500
_END = "<|macaw:end of grammar|>"


class GrammarError(ValueError):
    """A grammar that cannot be compiled, or cannot go on."""


class Vocabulary(NamedTuple):
    """A model's tokens as llguidance sees them.

    Attributes:
        tokenizer: With one token more than the model has, which is allowed where the output may end.
        size: Of the model: rows of its output projection.
        end: Id of the additional token.
    """

    tokenizer: LLTokenizer
    size: int
    end: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
        """The vocabulary of a fast tokenizer; takes a second for a large one. Raises `GrammarError`."""
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
            raise GrammarError(f"{type(tokenizer).__name__} is not a fast tokenizer; constrained decoding needs one.")
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        copy.add_special_tokens([_END])
        end = copy.get_vocab(with_added_tokens=True)[_END]
        return cls(LLTokenizer(copy.to_str(), n_vocab=max(size, end + 1), eos_token=end), size, end)


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning of a grammar; without the GIL. Raises `GrammarError`."""
    matcher = LLMatcher(tokenizer, grammar, limits=LIMITS, log_level=0)
    if matcher.is_error():
        raise GrammarError(error_of(matcher))
    return matcher


def error_of(matcher: LLMatcher) -> str:
    """What is wrong with a matcher, on one line and without the excerpt of the grammar."""
    lines = [line for line in matcher.get_error().splitlines() if not _EXCERPT.fullmatch(line)]
    error = " ".join(" ".join(lines).split()).rstrip(".")
    return {"NoExtensionBias": "nothing matches it"}.get(error, error[:_MAX_ERROR_LEN])


class GrammarState:
    """Where one sequence is in its grammar.

    Tokens that stop the sequence are allowed exactly where the output may end; `min_tokens` holds them back only
    while something else is allowed.

    Args:
        compiled: At the beginning of the grammar; it stays there.
        vocabulary: The one that the matcher was compiled for.
        params: Of the sequence.
        output_ids: What it has generated so far.

    Attributes:
        over: The output is complete, and nothing can follow.
        error: Why the sequence cannot go on, once that is so.
    """

    def __init__(
        self, compiled: LLMatcher, vocabulary: Vocabulary, params: SamplingParams, output_ids: Seq[int] = ()
    ) -> None:
        self._compiled = compiled
        self._matcher = compiled.deep_copy()
        self._end = vocabulary.end
        self._num_words = -(-max(vocabulary.size, vocabulary.end + 1) // 32)
        self._stop_ids = params.stop_token_ids
        self._stops = self._packed(self._stop_ids)
        self._texts = ~self._packed({*self._stop_ids, self._end})
        self._min_tokens = params.min_tokens
        self._outputs: list[int] = []
        self.over = False
        self.error: str | None = None
        self.accept(output_ids)

    def num_allowed(self, drafts: Seq[int]) -> int:
        """How many of the tokens could come next, in this order."""
        ends = (i for i, token in enumerate(drafts) if token in self._stop_ids or token == self._end)
        return self._matcher.validate_tokens(list(drafts[: next(ends, len(drafts))]))

    def masks(self, drafts: Seq[int] = ()) -> Masks:
        """What may come next after each number of drafts.

        Returns:
            ``[1 + len(drafts), num_words]``. Rows behind a draft that is not allowed, or completes the output, allow
            nothing, and so do all rows once the sequence is over or has an error.
        """
        rows = np.zeros((1 + len(drafts), self._num_words), np.int32)
        num_consumed = 0
        while True:
            fill_next_token_bitmask(self._matcher, rows, num_consumed)
            if self._matcher.is_error():
                rows[num_consumed] = 0
                break
            if self.num_allowed(drafts[num_consumed : num_consumed + 1]) == 0:
                break
            self._matcher.consume_token(drafts[num_consumed])
            num_consumed += 1
        if not self._matcher.is_error():
            self._matcher.rollback(num_consumed)
        elif num_consumed == 0:
            self.error = self._failure(error_of(self._matcher))
        else:  # behind a draft, which may be wrong; a matcher does not come back from an error
            self._matcher = self._compiled.deep_copy()
            self._matcher.consume_tokens(self._outputs)
        return self._with_stops(rows)

    def accept(self, tokens: Seq[int]) -> int:
        """Go on by tokens that the masks allowed, and say how many: fewer when the output is complete before."""
        for i, token in enumerate(tokens):
            if self.over or self.error is not None:
                return i
            if token in self._stop_ids:
                self.over = True
            elif self._matcher.consume_token(token):
                self._outputs.append(token)
                self.over = self._matcher.is_stopped()
            else:
                self.error = self._failure(error_of(self._matcher))
                return i
        return len(tokens)

    def _with_stops(self, rows: Masks) -> Masks:
        may_end = self._bit(rows, self._end)
        rows &= self._texts
        can_go_on = rows.any(axis=1)
        too_short = len(self._outputs) + np.arange(len(rows)) < self._min_tokens
        rows[may_end & ~(can_go_on & too_short)] |= self._stops
        if not rows[0].any():
            self.over = bool(may_end[0])  # nothing can follow, and there is no token to say so
            if not self.over:
                self.error = self.error or self._failure(
                    "no token of the model can follow; those that stop it may not, for the output is not complete"
                )
        return rows

    def _failure(self, reason: object) -> str:
        return f"After {len(self._outputs):,} tokens the grammar cannot go on: {reason}. Simplify it."

    def _packed(self, ids: Iterable[int]) -> Masks:
        bits = np.zeros(self._num_words * 32, np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    @staticmethod
    def _bit(rows: Masks, token: int) -> NDArray[np.bool_]:
        return (rows[:, token // 32] >> (token % 32) & 1).astype(np.bool_)
