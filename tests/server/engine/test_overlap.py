"""Overlap of the host with the device changes no token, whatever happens while a step is in flight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macaw_server.config import EngineConfig
from macaw_server.engine import core as core_module
from macaw_server.engine.core import EngineCore
from macaw_server.engine.sampler import Choices, Sampled
from macaw_server.engine.types import EngineRequest, SamplingParams
from server.engine.test_exactness import NUM_OUTPUT, cramped, prompts, run, stopping, variety
from tiny_models import save_model

PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


def count_ahead(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the steps that are launched before their tokens are known, as they come."""
    sizes: list[int] = []
    inner = core._runner.run

    def counted(chunks: Any, token_ids: Any = None) -> Any:
        if token_ids is not None:
            sizes.append(len(chunks))
        return inner(chunks, token_ids)

    monkeypatch.setattr(core._runner, "run", counted)
    return sizes


@pytest.mark.parametrize(("model_type", "native"), [("llama", True), ("gemma3_text", True), ("gpt_oss", False)])
def test_overlap_changes_nothing(
    model_type: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, model_type)
    requests = [
        EngineRequest(f"r{i}", prompt, replace(params, logprobs=2 if i % 3 else None, **(PENALTIES if i < 6 else {})))
        for i, (prompt, params) in enumerate(zip(prompts(), variety(), strict=True))
    ]
    plain = EngineCore(cramped(tmp_path, native=native, overlap=False))
    requests = stopping(requests, run(plain, requests))
    expected = run(plain, requests, late=2)
    core = EngineCore(cramped(tmp_path, native=native, overlap=True))
    sizes = count_ahead(core, monkeypatch)
    answers = run(core, requests, late=2)
    for name, (tokens, logprobs) in expected.items():
        assert answers[name][0] == tokens, name
        assert answers[name][1] == pytest.approx(logprobs, abs=2e-3)
    stats = core.stats()
    assert stats.preemptions > 0, "the pool is to be too small"
    assert stats.pages_used == 0
    assert len(sizes) > NUM_OUTPUT // 2, "steps are to run ahead"
    assert len(set(sizes)) > 1, "sequences are to end on the way"


def test_a_sequence_with_penalties_is_read_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = EngineCore(EngineConfig(dtype="float32", max_model_len=256, overlap=True))
    sizes = count_ahead(core, monkeypatch)
    params = SamplingParams(max_tokens=8, seed=1, frequency_penalty=0.5)
    run(core, [EngineRequest("r", [5, 6, 7], params)])
    assert sizes == []
    run(core, [EngineRequest("s", [5, 6, 7], replace(params, frequency_penalty=0.0))])
    assert sizes == [1] * 7


@dataclass(frozen=True)
class Act:
    """What happens before a step.

    Attributes:
        step: Which.
        request: Whom it is about, by number.
        abort: Or else it arrives.
    """

    step: int
    request: int
    abort: bool


NUM_REQUESTS = 6
ACTS = st.lists(st.builds(Act, st.integers(0, 20), st.integers(0, NUM_REQUESTS - 1), st.booleans()), max_size=12)


class Pair:
    """The demo model with and without overlap, and what each request is answered when nothing happens on the way."""

    def __init__(self) -> None:
        def core(overlap: bool) -> EngineCore:
            return EngineCore(
                EngineConfig(
                    dtype="float32",
                    page_size=4,
                    max_model_len=48,
                    max_num_seqs=3,
                    max_num_batched_tokens=16,
                    kv_memory=14 * page_bytes,
                    overlap=overlap,
                )
            )

        page_bytes = EngineCore(EngineConfig(dtype="float32", page_size=4, max_model_len=48)).info.page_bytes
        plain, self.core = core(False), core(True)
        self.number = count()
        params = [SamplingParams(max_tokens=4 + 5 * i, temperature=i % 2, seed=i, logprobs=0) for i in range(6)]
        self.requests = [EngineRequest(f"r{i}", list(range(5, 8 + 3 * i)), p) for i, p in enumerate(params)]
        self.requests = stopping(self.requests, run(plain, [replace(r, sampling=long(r)) for r in self.requests]))
        self.expected = run(plain, self.requests)


def long(request: EngineRequest) -> SamplingParams:
    return replace(request.sampling, max_tokens=24)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@settings(max_examples=60, deadline=None)
@given(acts=ACTS, broken=st.none() | st.integers(0, 15))
def test_whatever_happens_in_mid_flight(pair: Pair, acts: list[Act], broken: int | None) -> None:
    """Requests arrive and are aborted at any time, and a step may fail: each answer is right as far as it goes."""
    core, prefix = pair.core, f"{next(pair.number)}-"
    inner, steps = core._runner.run, count()

    def failing(*args: Any) -> Any:
        if next(steps) == broken:
            raise RuntimeError("out of memory")
        return inner(*args)

    core._runner.run = failing  # type: ignore[method-assign]
    answers: dict[str, list[int]] = {}
    ended: set[str] = set()
    aborted: set[str] = set()
    failed: set[str] = set()
    try:
        step = 0
        while core.has_work or any(act.step >= step for act in acts):
            for act in acts:
                name = prefix + pair.requests[act.request].request_id
                if act.step == step and not act.abort and name not in answers:
                    answers[name] = []
                    assert core.add(replace(pair.requests[act.request], request_id=name)) is None
                elif act.step == step and act.abort and name in answers and name not in ended:
                    core.abort([name])
                    aborted.add(name)
            for output in core.step():
                assert output.request_id not in ended | aborted, "an output after the last"
                answers[output.request_id] += output.token_ids
                if output.error is not None:
                    failed.add(output.request_id)
                if output.error is not None or output.finish_reason is not None:
                    ended.add(output.request_id)
            step += 1
    finally:
        core._runner.run = inner  # type: ignore[method-assign]
    assert ended | aborted == set(answers)
    for name, tokens in answers.items():
        expected = pair.expected[name.removeprefix(prefix)][0]
        assert tokens == (expected[: len(tokens)] if name in failed | aborted else expected)
    assert core.stats().pages_used == 0
    assert core._ahead is None, "what is in flight is work"
    assert not failed or broken is not None


def test_who_is_gone_hears_nothing_of_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    core = EngineCore(EngineConfig(dtype="float32", max_model_len=256, overlap=True))
    for name in ("aborted", "fails"):
        assert core.add(EngineRequest(name, [5, 6], SamplingParams(max_tokens=12, temperature=0))) is None
    core.step()

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(core._runner, "run", broken)
        assert [output.error for output in core.step()] == [None, None]
        core.abort(["aborted"])
        assert [(output.request_id, output.error is not None) for output in core.step()] == [("fails", True)]
    assert not core.has_work


def test_a_device_that_fails_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU tells late: the step is lost, and so is the one behind it; who waits goes on."""
    core = EngineCore(EngineConfig(dtype="float32", max_model_len=256, max_num_seqs=2, overlap=True))
    params = SamplingParams(max_tokens=12, temperature=0)
    prompts = {"first": [5, 6], "second": [7, 8], "waits": [9, 10, 11]}
    expected = {n: run(core, [EngineRequest(n, p, replace(params, logprobs=0))])[n][0] for n, p in prompts.items()}
    landed = count(1)

    class Failing(Choices):
        def result(self) -> list[Sampled]:
            if next(landed) == 4:
                raise RuntimeError("device-side assert")
            return super().result()

    monkeypatch.setattr(core_module, "sample", _sample_as(Failing))
    for name, prompt in prompts.items():
        assert core.add(EngineRequest(name, prompt, params)) is None
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    errors: dict[str, Any] = {}
    while core.has_work:
        for output in core.step():
            tokens[output.request_id] += output.token_ids
            if output.error is not None:
                errors[output.request_id] = output.error[1]
    assert errors == dict.fromkeys(("first", "second"), "The engine's step failed: RuntimeError: device-side assert")
    assert tokens == {"first": expected["first"][:3], "second": expected["second"][:3], "waits": expected["waits"]}
    assert core.stats().pages_used == 0


def _sample_as(kind: type[Choices]) -> Any:
    inner = core_module.sample

    def sample(logits: Any, rows: Sequence[Any], **options: Any) -> Choices:
        choices = inner(logits, rows, **options)
        choices.__class__ = kind
        return choices

    return sample
