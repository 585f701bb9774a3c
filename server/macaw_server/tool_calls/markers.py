"""Markers in a text that is still being written."""

from __future__ import annotations


def num_partial(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` begins with, but for the whole marker."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)
