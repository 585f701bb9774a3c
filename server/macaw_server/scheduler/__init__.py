"""Which calls run in the next step, and in what order. Pure: no clock, no I/O, no tensors."""

from macaw_server.scheduler.policy import AGEING_S, AppPolicy, FcfsPolicy, Policy, make_policy
from macaw_server.scheduler.prompt_lookup import PromptLookup
from macaw_server.scheduler.scheduler import Scheduler
from macaw_server.scheduler.speculation import Proposer, ProposerFactory, prompt_lookup
from macaw_server.scheduler.step_time import Coefficients, StepFeatures, StepTimeModel, step_features
from macaw_server.scheduler.types import (
    ScheduledBatch,
    ScheduledChunk,
    SchedulerConfig,
    Sequence,
    SequenceStatus,
)

__all__ = [
    "AGEING_S",
    "AppPolicy",
    "Coefficients",
    "FcfsPolicy",
    "Policy",
    "PromptLookup",
    "Proposer",
    "ProposerFactory",
    "ScheduledBatch",
    "ScheduledChunk",
    "Scheduler",
    "SchedulerConfig",
    "Sequence",
    "SequenceStatus",
    "StepFeatures",
    "StepTimeModel",
    "make_policy",
    "prompt_lookup",
    "step_features",
]
