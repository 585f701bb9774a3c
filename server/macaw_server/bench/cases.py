"""What is measured: bursts of equal requests, and the very tokens of their prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from macaw_server.bench.errors import BenchError


@dataclass(frozen=True, slots=True)
class Case:
    """`concurrency` requests sent at once, each of prefix and own tokens, each with `output_len` tokens of answer.

    Attributes:
        shared: One prefix for all requests, or one for each.
        warm: The prefixes, not the own tokens, have been sent before; else nobody has seen them.
        prefix_len, own_len, output_len: Tokens.
    """

    concurrency: int
    shared: bool
    warm: bool
    prefix_len: int
    own_len: int
    output_len: int

    @property
    def name(self) -> str:
        """Such as ``shared-32-warm``; a single request shares with nobody: ``single-warm``."""
        load = f"{'shared' if self.shared else 'unshared'}-{self.concurrency}" if self.concurrency > 1 else "single"
        return f"{load}-{'warm' if self.warm else 'cold'}"

    @property
    def prompt_len(self) -> int:
        """Tokens of each prompt."""
        return self.prefix_len + self.own_len

    def prompts(self, ids: range, seed: int, num_round: int, *, warm_up: bool = False) -> list[list[int]]:
        """Token ids of every prompt in this round; `warm_up` gives the same prefixes before other own tokens."""
        prefix_round = "all" if self.warm else num_round

        def tokens(length: int, *key: object) -> list[int]:
            return random.Random(f"{seed} {self.name} {key}").choices(ids, k=length)

        return [
            tokens(self.prefix_len, "prefix", prefix_round, 0 if self.shared else i)
            + tokens(self.own_len, "own", num_round, warm_up, i)
            for i in range(self.concurrency)
        ]


def make_cases(
    concurrency: Sequence[int], prefix_len: int, own_len: int, output_len: int, patterns: Sequence[str]
) -> list[Case]:
    """Every combination whose name matches one of the `patterns` (``shared-*-warm``).

    Raises:
        BenchError: A pattern that matches nothing, with the names that there are.
    """
    cases = [
        Case(n, shared, warm, prefix_len, own_len, output_len)
        for n in dict.fromkeys(concurrency)
        for shared in ((True, False) if n > 1 else (False,))
        for warm in (True, False)
    ]
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            names = ", ".join(case.name for case in cases)
            raise BenchError(f"No case matches {pattern!r}. There are: {names}.")
    return [case for case in cases if any(fnmatchcase(case.name, pattern) for pattern in patterns)]
