"""The cases: which there are, and what their prompts share."""

from __future__ import annotations

import pytest

from macaw_server.bench.cases import Case, make_cases
from macaw_server.bench.errors import BenchError

IDS = range(1000, 2000)


def prefixes(case: Case, num_round: int, *, seed: int = 1, warm_up: bool = False) -> list[tuple[int, ...]]:
    return [tuple(prompt[: case.prefix_len]) for prompt in case.prompts(IDS, seed, num_round, warm_up=warm_up)]


def test_names() -> None:
    names = [case.name for case in make_cases([1, 8, 8], 10, 2, 4, ["*"])]
    eight = ["shared-8-warm", "shared-8-cold", "unshared-8-warm", "unshared-8-cold"]
    assert names == ["single-warm", "single-cold", *eight]
    assert [case.name for case in make_cases([1, 8, 32], 10, 2, 4, ["shared-*-warm", "single-cold"])] == [
        "single-cold",
        "shared-8-warm",
        "shared-32-warm",
    ]


def test_a_pattern_without_a_case_is_refused() -> None:
    with pytest.raises(BenchError, match=r"No case matches 'shard-\*'. There are: single-warm, single-cold"):
        make_cases([1], 10, 2, 4, ["single-*", "shard-*"])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_prompts_share_what_the_name_says(shared: bool, warm: bool) -> None:
    case = Case(8, shared, warm, prefix_len=40, own_len=10, output_len=4)
    prompts = case.prompts(IDS, 1, 0)
    assert {len(prompt) for prompt in prompts} == {50}
    assert all(token in IDS for prompt in prompts for token in prompt)
    assert len(set(prefixes(case, 0))) == (1 if shared else 8)
    assert len({tuple(prompt[40:]) for prompt in prompts}) == 8
    assert prompts == case.prompts(IDS, 1, 0), "both sides get the same"
    assert set(prefixes(case, 0)).isdisjoint(prefixes(case, 1)) != warm
    assert set(prefixes(case, 0)).isdisjoint(prefixes(case, 0, seed=2))


def test_a_warm_up_has_the_prefixes_and_other_own_tokens() -> None:
    case = Case(4, False, True, prefix_len=40, own_len=10, output_len=4)
    assert prefixes(case, 3, warm_up=True) == prefixes(case, 3)
    own = {tuple(prompt[40:]) for prompt in case.prompts(IDS, 1, 3)}
    assert own.isdisjoint(tuple(prompt[40:]) for prompt in case.prompts(IDS, 1, 3, warm_up=True))
