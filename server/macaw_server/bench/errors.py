"""The one error of a benchmark."""

from __future__ import annotations


class BenchError(Exception):
    """Nothing is reported: a server failed, or did other work than was asked for. The message says which and how."""
