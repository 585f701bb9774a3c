"""The file that `macaw simulate fit` writes: the time of steps, and the limits of the engine that was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from macaw_server.errors import StartupError
from macaw_server.scheduler import StepTimeModel

LIMITS = ("num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len")


class ModelFileError(StartupError):
    """The file cannot be read, or is something else."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What is known of an engine.

    Attributes:
        step_time: How long its steps take.
        limits: Fields of `SimulationConfig`, by the names in `LIMITS`.
        facts: Where it was measured.
    """

    step_time: StepTimeModel
    limits: dict[str, int] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it."""
        content = {"step_time": self.step_time.to_dict(), "limits": self.limits, "facts": self.facts}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ModelFile:
        """Read it.

        Raises:
            ModelFileError: There is no such file, or it is not one of these.
        """
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            limits = {name: int(content["limits"][name]) for name in LIMITS if name in content["limits"]}
            return cls(StepTimeModel.from_dict(content["step_time"]), limits, dict(content["facts"]))
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise ModelFileError(f"{path} is not a step-time file ({e}); `macaw simulate fit` writes one.") from e
