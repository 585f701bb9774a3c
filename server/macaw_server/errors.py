"""What can go wrong before the first request: one tree, each message with what was seen, accepted, and to do.

::

    StartupError
    ├── ModelLoadError       the model is missing, incomplete, of an unsupported kind, or answers wrongly
    ├── MemoryBudgetError    the KV pool does not fit, or does not hold one whole context
    ├── PortInUseError       another process listens on the port
    └── ConfigError          flags or variables that contradict each other

Errors of requests are `macaw.errors`.
"""

from __future__ import annotations


class StartupError(Exception):
    """The server cannot start; the message is for the person at the terminal."""


class ModelLoadError(StartupError):
    """The model is missing, incomplete, of an unsupported kind, or would answer wrongly."""


class MemoryBudgetError(StartupError):
    """The KV pool does not fit into memory, or does not hold one whole context."""


class PortInUseError(StartupError):
    """Another process listens on the port."""


class ConfigError(StartupError):
    """Flags or variables that contradict each other."""
