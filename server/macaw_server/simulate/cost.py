"""What a scheduling decision costs, by the number of calls that wait."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass

from macaw_server.engine.types import CallClass, CallHints, EngineRequest, SamplingParams
from macaw_server.scheduler import StepTimeModel
from macaw_server.simulate.virtual import SimulationConfig


@dataclass(frozen=True, slots=True)
class DecisionCost:
    """Of one policy at one length of the queue.

    Attributes:
        policy: Its name.
        num_waiting: Calls that wait at the beginning; all of them are run.
        us_per_call: Microseconds of scheduling per call, from taking it up to its end; median of the rounds.
        us_per_step: The same per step.
        num_steps: Of one round.
    """

    policy: str
    num_waiting: int
    us_per_call: float
    us_per_step: float
    num_steps: int


def decision_cost(policy: str, num_waiting: int, *, min_calls: int = 2000) -> DecisionCost:
    """Schedule so many waiting calls to their end; repeated until `min_calls` have been scheduled.

    Programs of 16 calls of all classes and 8 tenants; prompts of 64 to 512 tokens behind a prefix that each tenant's
    calls share, answers of 16 tokens.
    """
    num_rounds = max(1, -(-min_calls // num_waiting))
    rounds = [_round(policy, num_waiting, seed) for seed in range(num_rounds)]
    num_steps = rounds[0][1]
    seconds = statistics.median(seconds for seconds, _ in rounds)
    return DecisionCost(policy, num_waiting, 1e6 * seconds / num_waiting, 1e6 * seconds / num_steps, num_steps)


def _round(policy: str, num_waiting: int, seed: int) -> tuple[float, int]:
    """Seconds of scheduling, and steps."""
    scheduler = SimulationConfig(policy=policy, max_num_batched_tokens=2048).scheduler(StepTimeModel())
    requests = _requests(num_waiting, seed)
    num_steps, now_s = 0, 1.0
    begin = time.perf_counter()
    for request in requests:
        scheduler.add(request, now_s)
    seconds = time.perf_counter() - begin
    while scheduler.has_work:
        begin = time.perf_counter()
        batch = scheduler.schedule(now_s)
        seconds += time.perf_counter() - begin
        sampled = {chunk.sequence.request_id: [-1] for chunk in batch.chunks if chunk.samples}
        begin = time.perf_counter()
        scheduler.update(batch, sampled)
        seconds += time.perf_counter() - begin
        num_steps += 1
        now_s += 0.01
    return seconds, num_steps


def _requests(num_waiting: int, seed: int) -> list[EngineRequest]:
    draw = random.Random(seed)
    requests = []
    for i in range(num_waiting):
        tenant = i % 8
        start = (i + 1) << 20
        prompt = [*range(tenant * 64, tenant * 64 + 64), *range(start, start + draw.randint(64, 512))]
        hints = CallHints(
            program_id=f"p{i // 16}",
            call_class=draw.choice([c for c in CallClass if c is not CallClass.AHEAD]),
            depth=draw.randrange(4),
            arrival_s=draw.random(),
        )
        requests.append(EngineRequest(f"r{i}", prompt, SamplingParams(max_tokens=16), salt=f"t{tenant}", hints=hints))
    return requests
