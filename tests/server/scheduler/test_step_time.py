from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macaw_server.kvcache import KVCache
from macaw_server.scheduler import Coefficients, Scheduler, SchedulerConfig, StepFeatures, StepTimeModel, step_features
from macaw_server.scheduler.least_squares import NormalEquations, solve_nonnegative
from macaw_server.scheduler.step_time import KNEE, PRIOR
from server.scheduler.engine_model import request

TRUTH = Coefficients(fixed=4.0, token=0.3, sample=0.5, kv_token=1e-3, score=5e-5)


def decode(batch: int, context: int, prefix: int = 0) -> StepFeatures:
    """Sequences that share a prefix."""
    own = context - prefix
    return StepFeatures(batch, batch, prefix + batch * own, batch * context)


def prefill(length: int, start: int = 0) -> StepFeatures:
    return StepFeatures().plus(start, length, num_samples=1)


def random_step(rng: random.Random) -> StepFeatures:
    if rng.random() < 0.2:
        return prefill(rng.randint(2, 512), rng.randint(0, 4096))
    context = rng.randint(16, 4096)
    return decode(rng.randint(1, 64), context, rng.randint(0, context - 1))


def time_ms(truth: Coefficients, f: StepFeatures) -> float:
    beyond = truth.beyond * max(0, f.num_tokens - KNEE)
    return truth.fixed + sum(c * n for c, n in zip(truth[1:-1], f, strict=True)) + beyond


def trained(truth: Coefficients, steps: int = 400, *, noise: float = 0.0, seed: int = 0) -> StepTimeModel:
    rng, model = random.Random(seed), StepTimeModel()
    for _ in range(steps):
        f = random_step(rng)
        model.observe(f, time_ms(truth, f) * rng.lognormvariate(0, noise))
    return model


def worst_error(model: StepTimeModel, truth: Coefficients, seed: int = 1) -> float:
    rng = random.Random(seed)
    steps = [random_step(rng) for _ in range(100)]
    return max(abs(model.predict(f) / time_ms(truth, f) - 1) for f in steps)


coefficients = st.builds(
    Coefficients,
    fixed=st.floats(0.1, 100),
    token=st.floats(0, 2),
    sample=st.floats(0, 2),
    kv_token=st.floats(0, 1e-2),
    score=st.floats(0, 1e-3),
    beyond=st.floats(0, 2),
)


@settings(deadline=None, max_examples=50)
@given(coefficients)
def test_what_is_linear_is_found(truth: Coefficients) -> None:
    assert worst_error(trained(truth), truth) < 0.1


@settings(deadline=None, max_examples=25)
@given(coefficients, st.integers(0, 100))
def test_noise_averages_out(truth: Coefficients, seed: int) -> None:
    assert worst_error(trained(truth, noise=0.05, seed=seed), truth) < 0.15


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 600), st.integers(0, 5000), st.floats(1e-2, 1e5)), min_size=1, max_size=60))
def test_whatever_is_observed_more_work_takes_no_less_time(steps: list[tuple[int, int, float]]) -> None:
    model = StepTimeModel()
    for length, start, observed_ms in steps:
        model.observe(prefill(length, start), observed_ms)
    assert min(model.coefficients) >= 0
    assert 0 < model.predict(prefill(10)) <= model.predict(prefill(20)) <= model.predict(prefill(20, start=100))
    assert model.predict(decode(1, 100)) <= model.predict(decode(2, 100))


def test_one_step_sets_the_scale() -> None:
    model = StepTimeModel()
    model.observe(decode(1, 100), 0.5)
    assert model.predict(decode(1, 100)) == pytest.approx(0.5, rel=0.05)
    assert model.coefficients.token / model.coefficients.fixed == pytest.approx(PRIOR.token / PRIOR.fixed, rel=0.3)


def test_a_stall_changes_little() -> None:
    model = trained(TRUTH, noise=0.03)
    before = {f: model.predict(f) for f in (decode(1, 100), decode(32, 1000), prefill(512))}
    for f, expected in before.items():
        model.observe(f, 10 * expected)
    assert model.coefficients  # with the stalls in it
    for f, expected in before.items():
        assert model.predict(f) == pytest.approx(expected, rel=0.05)


def test_a_stall_at_the_start_is_forgotten() -> None:
    model = StepTimeModel()
    model.observe(decode(1, 100), 1000.0)  # the first step, with everything cold
    rng = random.Random(3)
    for _ in range(300):
        f = random_step(rng)
        model.observe(f, time_ms(TRUTH, f))
    assert worst_error(model, TRUTH) < 0.1


def test_a_lasting_change_is_learned() -> None:
    model, slow = trained(TRUTH, noise=0.03), Coefficients(*(3 * c for c in TRUTH))
    rng = random.Random(5)
    for _ in range(1000):
        f = random_step(rng)
        model.observe(f, time_ms(slow, f) * rng.lognormvariate(0, 0.03))
    assert worst_error(model, slow) < 0.15


def test_prefills_are_remembered_through_an_hour_of_decoding() -> None:
    model, rng = trained(TRUTH), random.Random(7)
    for _ in range(10_000):
        f = decode(rng.randint(1, 8), rng.randint(100, 200))
        model.observe(f, time_ms(TRUTH, f))
    assert model.predict(prefill(512)) == pytest.approx(time_ms(TRUTH, prefill(512)), rel=0.1)


def test_saved_and_restored() -> None:
    model = trained(TRUTH)
    restored = StepTimeModel.from_dict(json.loads(json.dumps(model.to_dict())))
    assert restored.predict(prefill(100, 50)) == model.predict(prefill(100, 50))
    restored.observe(decode(1, 100), time_ms(TRUTH, decode(1, 100)))
    assert restored.predict(prefill(100)) == pytest.approx(time_ms(TRUTH, prefill(100)), rel=0.05)


@pytest.mark.parametrize("saved", [{}, {"coefficients": {"fixed": 1}}, {"coefficients": 3}])
def test_what_is_no_model_is_refused(saved: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="macaw simulate fit"):
        StepTimeModel.from_dict(saved)


def test_impossible_times_and_priors_are_refused() -> None:
    with pytest.raises(ValueError, match="times are positive"):
        StepTimeModel().observe(decode(1, 1), 0.0)
    with pytest.raises(ValueError, match="at least 0"):
        StepTimeModel(Coefficients(1, -1, 0, 0, 0))


def test_features_of_a_batch_count_shared_pages_once() -> None:
    cache = KVCache(64, 4)
    scheduler = Scheduler(SchedulerConfig(8, 64, 200), cache)
    shared = list(range(16))
    scheduler.add(request("a", [*shared, 50], 8), 0.0)
    batch = scheduler.schedule(0.0)
    assert step_features(batch) == StepFeatures(17, 1, 17, 17 * 18 // 2)
    scheduler.update(batch, {"a": [1]})
    for name in "bc":
        scheduler.add(request(name, [*shared, 60 + ord(name)], 8), 0.0)
    batch = scheduler.schedule(0.0)  # a decodes at position 17; b and c run their last token
    contexts = 18 + 17 + 17
    assert step_features(batch) == StepFeatures(3, 3, contexts - 2 * 16, contexts)


def test_features_of_chunks_and_of_what_they_read_in_the_same_step() -> None:
    scheduler = Scheduler(SchedulerConfig(8, 12, 200), KVCache(64, 4))
    scheduler.add(request("a", list(range(20)), 8), 0.0)
    batch = scheduler.schedule(0.0)
    assert step_features(batch) == StepFeatures(12, 0, 12, 78)
    scheduler.update(batch, {})
    scheduler.add(request("b", [*range(12), 99], 8), 0.0)
    batch = scheduler.schedule(0.0)  # the rest of a, and b behind the pages that the last step made
    assert step_features(batch) == StepFeatures(9, 2, 20 + 1, StepFeatures().plus(12, 8).num_scores + 13)


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_nonnegative_least_squares_is_optimal(seed: int) -> None:
    rng, sums = random.Random(seed), NormalEquations(3)
    for _ in range(rng.randint(1, 6)):
        sums.add([rng.choice([-1, 1]) * rng.uniform(0.1, 2) for _ in range(3)], rng.uniform(-2, 2), rng.uniform(0.1, 1))

    def loss(x: list[float]) -> float:
        pulls = sum(1e-3 * (v - 1) ** 2 for v in x)
        quadratic = sum(x[i] * sums.xx[i][j] * x[j] for i in range(3) for j in range(3))
        return quadratic - 2 * sum(b * v for b, v in zip(sums.xy, x, strict=True)) + pulls

    found = solve_nonnegative(sums, [1.0, 1.0, 1.0], 1e-3)
    assert min(found) >= 0
    for i in range(3):
        for step in (-0.01, 0.01):
            other = [max(0.0, v + step) if j == i else v for j, v in enumerate(found)]
            assert loss(found) <= loss(other) + 1e-9
