"""Stop strings in a stream of text: found wherever the pieces are cut, in time linear in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Released(NamedTuple):
    """Text that is certainly before any stop string, and the stop string that was found, if any."""

    text: str
    stopped_by: str | None


class StopStrings:
    """Searches for several strings at once, character by character (Knuth-Morris-Pratt).

    The one whose last character comes first stops the text; among several that end there, the longest.
    """

    __slots__ = ("_failure", "_held", "_matched", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failure: list[list[int]] = [[] for _ in self._stops]  # as far as it has matched: a stop may be huge
        self._matched = [0] * len(self._stops)  # length of the prefix of each that the text ends with
        self._held = ""

    def add(self, text: str) -> Released:
        """Search a piece of text. What may be the start of a stop string is held back for the next piece."""
        if not self._stops:
            return Released(text, None)
        buffer = self._held + text
        for i in range(len(self._held), len(buffer)):
            for k, stop in enumerate(self._stops):
                if self._step(k, buffer[i]) == len(stop):
                    self._held = ""
                    return Released(buffer[: i + 1 - len(stop)], stop)
        keep = max(self._matched)
        self._held = buffer[len(buffer) - keep :]
        return Released(buffer[: len(buffer) - keep], None)

    def flush(self) -> str:
        """What was held back: the text has ended, so it is no stop string."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _step(self, k: int, char: str) -> int:
        stop, failure, matched = self._stops[k], self._failure[k], self._matched[k]
        while matched and stop[matched] != char:
            matched = failure[matched - 1]
        self._matched[k] = matched = matched + (stop[matched] == char)
        if matched > len(failure):
            _extend_failure_function(failure, stop)
        return matched


def _extend_failure_function(failure: list[int], pattern: str) -> None:
    """Add the next prefix's entry: the length of its longest proper prefix that is also its suffix."""
    end = len(failure)
    matched = failure[-1] if failure else 0
    while matched and pattern[end] != pattern[matched]:
        matched = failure[matched - 1]
    failure.append(matched + (end > 0 and pattern[end] == pattern[matched]))
