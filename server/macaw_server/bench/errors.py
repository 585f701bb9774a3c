"""The errors of a benchmark."""

from __future__ import annotations


class BenchError(Exception):
    """Nothing is reported: a server failed, or did other work than was asked for. The message says which and how."""


class RefusedError(BenchError):
    """The server has a full queue; where a rate is tried, that is an answer to it and no failure."""
