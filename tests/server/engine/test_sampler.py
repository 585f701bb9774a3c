"""Sampling: greedy, filters, penalties, reproducibility, log-probabilities."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from macaw_server.engine import sampler
from macaw_server.engine.sampler import Row, Sampled, uniform
from macaw_server.engine.types import SamplingParams

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]))
_kernels = {"native": True}


@pytest.fixture(autouse=True, params=[True, False], ids=["native", "torch"])
def _each_way(request: pytest.FixtureRequest) -> None:
    _kernels["native"] = request.param


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Sampled]:
    return sampler.sample(logits, rows, **_kernels).result()


def draw(num: int, *, output: tuple[int, ...] = (), prompt: tuple[int, ...] = (0,), **params: float) -> Counter[int]:
    """How often each token comes up over `num` seeds, from one batch."""
    rows = [
        Row(SamplingParams(max_tokens=9, seed=seed, **params), (*prompt, *output), len(prompt)) for seed in range(num)
    ]
    return Counter(choice.token for choice in sample(LOGITS.repeat(num, 1), rows))


def test_temperature_zero_takes_the_most_likely() -> None:
    assert draw(50, temperature=0) == {0: 50}


def test_draws_follow_the_distribution() -> None:
    counts = draw(20_000, temperature=1.0)
    for token, probability in enumerate([0.5, 0.25, 0.15, 0.07, 0.03]):
        assert counts[token] / 20_000 == pytest.approx(probability, abs=0.015)


def test_temperature_sharpens_and_flattens() -> None:
    weights = torch.softmax(LOGITS / 0.5, dim=0)
    assert draw(20_000, temperature=0.5)[0] / 20_000 == pytest.approx(weights[0].item(), abs=0.015)
    assert draw(4_000, temperature=2.0)[4] > draw(4_000, temperature=1.0)[4]


@pytest.mark.parametrize("temperature", [1e-300, 1e-309, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    assert draw(50, temperature=temperature) == {0: 50}


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.9}, {0, 1, 2}),
        ({"min_p": 0.29}, {0, 1, 2}),
        ({"min_p": 0.51}, {0}),
        ({"top_k": 3, "top_p": 0.6}, {0, 1}),
    ],
)
def test_filters_keep_exactly_the_nucleus(params: dict[str, float], allowed: set[int]) -> None:
    assert set(draw(3_000, temperature=1.0, **params)) == allowed


def test_filters_of_one_row_do_not_touch_another() -> None:
    rows = [Row(SamplingParams(1, seed=s, top_k=1 if s % 2 else 0), (0,), 1) for s in range(2_000)]
    choices = [choice.token for choice in sample(LOGITS.repeat(2_000, 1), rows)]
    assert set(choices[1::2]) == {0}
    assert set(choices[0::2]) == {0, 1, 2, 3, 4}


def test_filters_of_one_row_do_not_change_the_draw_of_another() -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25]))
    plain = [Row(SamplingParams(1, seed=seed), (0,), 1) for seed in range(200)]
    filtered = Row(SamplingParams(1, top_p=0.9), (0,), 1)
    alone = sample(logits.repeat(200, 1), plain)
    assert sample(logits.repeat(201, 1), [*plain, filtered])[:200] == alone


def test_a_row_behind_drafts_is_the_row_that_has_them_as_output() -> None:
    params = SamplingParams(
        9,
        seed=3,
        frequency_penalty=0.4,
        presence_penalty=0.2,
        repetition_penalty=1.3,
        min_tokens=4,
        stop_token_ids=frozenset({1}),
        logprobs=2,
    )
    for n in range(5):
        tokens, drafts = (0, 3, 3, 4, 2)[: 5 - n], (0, 3, 3, 4, 2)[5 - n :]
        behind, plain = Row(params, tokens, 0, drafts), Row(params, tokens + drafts, 0)
        assert sample(LOGITS.clone()[None], [behind]) == sample(LOGITS.clone()[None], [plain])


def test_a_row_ahead_of_an_unknown_token_draws_as_if_it_were_known() -> None:
    params = SamplingParams(9, seed=3, min_tokens=3, stop_token_ids=frozenset({1}), logit_bias={2: 0.5}, logprobs=1)
    for n in range(1, 6):
        ahead, plain = Row(params, (0,) * n, 1, num_ahead=1), Row(params, (0,) * n + (4,), 1)
        assert sample(LOGITS.clone()[None], [ahead]) == sample(LOGITS.clone()[None], [plain])


def test_penalties_and_bias() -> None:
    assert draw(1, temperature=0, output=(0,), presence_penalty=2.0) == {1: 1}
    assert draw(1, temperature=0, output=(0, 0, 0), frequency_penalty=0.3) == {1: 1}
    assert draw(1, temperature=0, output=(0,), frequency_penalty=0.3) == {0: 1}
    assert draw(1, temperature=0, prompt=(0,), presence_penalty=2.0) == {0: 1}, "the prompt is not penalised"
    assert draw(1, temperature=0, prompt=(0,), repetition_penalty=3.0) == {1: 1}, "repetition counts the prompt"
    biased = Row(SamplingParams(1, temperature=0, logit_bias={4: 100.0}), (0,), 1)
    assert sample(LOGITS.clone()[None], [biased])[0].token == 4


def test_min_tokens_holds_stop_tokens_back() -> None:
    params = SamplingParams(9, temperature=0, stop_token_ids=frozenset({0}), min_tokens=2)
    assert sample(LOGITS.clone()[None], [Row(params, (7, 1), 1)])[0].token == 1
    assert sample(LOGITS.clone()[None], [Row(params, (7, 1, 1), 1)])[0].token == 0


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    row = Row(SamplingParams(9, seed=123), (5, 6, 7), 1)
    alone = sample(LOGITS.clone()[None], [row])[0].token
    others = [Row(SamplingParams(9, seed=s, top_k=3), (1,), 1) for s in range(7)]
    assert sample(LOGITS.repeat(8, 1), [*others, row])[7].token == alone


def test_uniform_is_uniform_over_index_and_seed() -> None:
    for numbers in ([uniform(1, i) for i in range(10_000)], [uniform(i, 1) for i in range(10_000)]):
        assert all(0 <= u < 1 for u in numbers)
        histogram = Counter(int(u * 10) for u in numbers)
        assert all(850 < histogram[bucket] < 1_150 for bucket in range(10))


def test_logprobs_are_the_models_own() -> None:
    row = Row(SamplingParams(9, temperature=0, logprobs=2, logit_bias={3: 50.0}), (0,), 1)
    choice = sample(LOGITS.clone()[None], [row])[0]
    assert choice.token == 3
    assert choice.logprobs is not None
    assert choice.logprobs.logprob == pytest.approx(LOGITS[3].item(), abs=1e-5)
    assert [token for token, _ in choice.logprobs.top] == [0, 1]


def test_each_row_reports_as_many_logprobs_as_it_asked_for() -> None:
    wanted = [None, 0, 3, None, 1]
    rows = [Row(SamplingParams(9, temperature=0, logprobs=n), (0,), 1) for n in wanted]
    choices = sample(torch.stack([LOGITS.roll(i) for i in range(5)]), rows)
    assert [choice.token for choice in choices] == [0, 1, 2, 3, 4]
    assert [choice.logprobs and len(choice.logprobs.top) for choice in choices] == wanted
    top = choices[2].logprobs
    assert top is not None
    assert [token for token, _ in top.top] == [2, 3, 4]
    assert top.logprob == top.top[0][1]


def test_logprobs_of_ruled_out_tokens_are_finite() -> None:
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    choice = sample(logits, [Row(SamplingParams(9, temperature=0, logprobs=2), (0,), 1)])[0]
    assert choice.logprobs is not None
    assert choice.logprobs.top[1][1] == -9999.0


def test_logits_that_are_not_numbers_are_reported_for_that_row_only() -> None:
    logits = LOGITS.repeat(2, 1)
    logits[0, 2] = torch.nan
    rows = [Row(SamplingParams(1, seed=1), (0,), 1), Row(SamplingParams(1, temperature=0), (0,), 1)]
    assert [choice.token for choice in sample(logits, rows)] == [None, 0]


def test_native_and_torch_choose_the_same_tokens() -> None:
    """But for sums that round differently right where a token ends and the next one begins."""
    rng = random.Random(3)
    vocab = 5_003
    logits = torch.randn(400, vocab, generator=torch.Generator().manual_seed(1)) * 3
    logits[::7] = logits[::7].round()  # ties

    def params(seed: int) -> dict[str, Any]:
        filters = {"top_k": rng.choice([1, 7, 300]), "top_p": rng.random(), "min_p": rng.random() / 5}
        some = {name: value for name, value in filters.items() if rng.random() < 0.5}
        return {"temperature": rng.choice([0.0, 0.3, 1.0, 2.0]), "seed": seed, **some}

    rows = []
    for seed in range(len(logits)):
        mask = None
        if seed % 3 == 0:
            mask = np.array([rng.getrandbits(32) for _ in range(-(-vocab // 32))], dtype=np.uint32).view(np.int32)
        rows.append(Row(SamplingParams(max_tokens=9, **params(seed)), (0,), 1, mask=mask))
    native = sampler.sample(logits.clone(), rows, native=True).result()
    by_torch = sampler.sample(logits.clone(), rows, native=False).result()
    assert sum(a != b for a, b in zip(native, by_torch, strict=True)) <= 4


def test_a_mask_that_allows_nothing_is_reported_for_that_row_only() -> None:
    rows = [Row(SamplingParams(9, temperature=t), (0,), 1, mask=np.zeros(1, dtype=np.int32)) for t in (0, 1)]
    rows.append(Row(SamplingParams(9, temperature=1), (0,), 1, mask=np.array([4], dtype=np.int32)))
    assert [choice.token for choice in sample(LOGITS.repeat(3, 1), rows)] == [None, None, 2]
