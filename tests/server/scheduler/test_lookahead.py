"""Steps ahead of the tokens: where there are any, who takes part, and that nothing is kept of what was in vain."""

from dataclasses import replace
from typing import Any

import pytest

from macaw_server.scheduler import ScheduledBatch
from server.scheduler.engine_model import STOP, EngineModel


def decoding(*max_tokens: int, **limits: Any) -> EngineModel:
    """An engine whose requests have run one step, their prefill, and whose tokens never stop them."""
    engine = EngineModel(**{"max_num_seqs": 4, "sampler": lambda tokens: 1, **limits})
    for i, n in enumerate(max_tokens):
        engine.add(f"r{i}", [i, 5, 6, 7], n)
    engine.scheduler.schedule(1.0)
    return engine


def names(batch: ScheduledBatch | None) -> list[str]:
    return [] if batch is None else [chunk.sequence.request_id for chunk in batch.chunks]


def test_who_ends_for_sure_does_not_take_part() -> None:
    assert names(decoding(1, 2, 3).scheduler.schedule_ahead()) == ["r1", "r2"]
    assert decoding(1, 1).scheduler.schedule_ahead() is None
    assert names(decoding(9, max_model_len=5).scheduler.schedule_ahead()) == []


def test_nobody_waits_for_a_place_that_is_sure_to_become_free() -> None:
    full = decoding(5, 5, 5, 5)
    full.add("waits", [1])
    assert names(full.scheduler.schedule_ahead()) == ["r0", "r1", "r2", "r3"]
    ending = decoding(5, 5, 5, 1)
    ending.add("waits", [1])
    assert ending.scheduler.schedule_ahead() is None
    not_full = decoding(5, 5)
    not_full.add("waits", [1])
    assert not_full.scheduler.schedule_ahead() is None


@pytest.mark.parametrize(
    "sampling",
    [{"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"repetition_penalty": 1.1}, {"grammar": "start: /a/"}],
    ids=lambda sampling: next(iter(sampling)),
)
def test_what_depends_on_the_tokens_waits_for_them(sampling: dict[str, Any]) -> None:
    engine = decoding(5)
    sequence = engine.sequences["r0"]
    assert names(engine.scheduler.schedule_ahead()) == ["r0"]
    sequence.request = replace(sequence.request, sampling=replace(sequence.request.sampling, **sampling))
    assert engine.scheduler.schedule_ahead() is None


def test_none_while_prompts_are_computed_or_tokens_are_drafted() -> None:
    assert decoding(5, 5, max_num_batched_tokens=6).scheduler.schedule_ahead() is None
    assert decoding(5, max_draft_tokens=2).scheduler.schedule_ahead() is None


def test_nobody_is_preempted_and_pages_go_back() -> None:
    """Two sequences want a page each, and there is one."""
    engine = decoding(5, 5, num_pages=5, page_size=2)
    assert engine.scheduler.schedule_ahead() is None
    assert engine.cache.pool.num_free == 1
    engine.cache.check()


@pytest.mark.parametrize("page_size", [1, 2, 3])
def test_a_token_in_vain_leaves_no_trace(page_size: int) -> None:
    """One stops, one is aborted, one goes on, all with a step in flight; what they computed is found again."""
    engine = EngineModel(page_size=page_size, overlap=True, sampler=lambda tokens: STOP if len(tokens) == 9 else 1)
    for name, prompt in (("stops", [0, 1, 2]), ("aborted", [3, 4, 5, 6, 7, 8]), ("goes-on", [2, 1])):
        engine.add(name, prompt, 12, stop=frozenset({STOP}) if name == "stops" else frozenset())
    engine.step()
    engine.scheduler.abort("aborted")
    engine.run()
    assert engine.num_ahead > 8
    for name in ("stops", "goes-on"):
        engine.check_finished(engine.sequences[name])
    again = engine.add("again", [*engine.sequences["stops"].token_ids, 7], 1)
    engine.run()
    assert again.cached_tokens == 9 // page_size * page_size
    engine.check_no_leak()
