"""The engine core when a step goes wrong: who is told, and who goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue
from threading import Thread
from typing import Any

import pytest
import torch

from macaw_server.config import EngineConfig
from macaw_server.engine.core import EngineCore
from macaw_server.engine.loop import Add, GetStats, Inbound, Outbound, Outputs, Stop, run_loop
from macaw_server.engine.types import CallClass, CallHints, EngineOutput, EngineRequest, Reuse, SamplingParams


def request(name: str, *prompt: int, num_tokens: int = 12) -> EngineRequest:
    return EngineRequest(name, list(prompt), SamplingParams(max_tokens=num_tokens, temperature=0))


def finish(core: EngineCore) -> dict[str, list[EngineOutput]]:
    outputs: dict[str, list[EngineOutput]] = {}
    while core.has_work:
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.fixture(params=[False, True], ids=["one-by-one", "overlap"])
def core(request: pytest.FixtureRequest) -> EngineCore:
    return EngineCore(EngineConfig(dtype="float32", max_model_len=256, max_num_seqs=2, overlap=request.param))


def broken_at(step: int, run: Callable[..., torch.Tensor], how: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`run`, whose result in one step goes through `how`."""
    count = 0

    def broken(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        logits = run(*args)
        return how(logits) if count == step else logits

    return broken


def out_of_memory(logits: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of memory")


def test_a_failed_step_ends_its_requests_and_no_others(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert core.add(request("alone", 9, 10, 11)) is None
    expected = tokens(finish(core)["alone"])

    monkeypatch.setattr(core._runner, "run", broken_at(3, core._runner.run, out_of_memory))
    for name in ("first", "second", "waits"):  # two fit into a batch
        assert core.add(request(name, *((9, 10, 11) if name == "waits" else (5, 6)))) is None
    outputs = finish(core)
    for name in ("first", "second"):
        assert outputs[name][-1].error == ("internal_error", "The engine's step failed: RuntimeError: out of memory")
        assert len(tokens(outputs[name])) == 2
    assert tokens(outputs["waits"]) == expected
    assert outputs["waits"][-1].finish_reason == "length"
    assert core.stats().pages_used == 0


def test_logits_that_are_no_numbers_fail_one_request(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(logits: torch.Tensor) -> torch.Tensor:
        logits[0, 5] = torch.nan
        return logits

    with torch.inference_mode():
        monkeypatch.setattr(core._runner, "run", broken_at(4, core._runner.run, torch.inference_mode()(spoil)))
    for name, prompt in (("sick", 5), ("sound", 6)):
        assert core.add(request(name, prompt)) is None
    outputs = finish(core)
    assert outputs["sick"][-1].error is not None
    assert "not numbers" in outputs["sick"][-1].error[1]
    assert (len(tokens(outputs["sick"])), len(tokens(outputs["sound"]))) == (3, 12)
    assert core.stats().pages_used == 0


def test_a_request_taken_up_again_goes_on_as_it_would_have(core: EngineCore) -> None:
    whole = EngineRequest("whole", [5, 6, 7], SamplingParams(max_tokens=12, seed=11))
    assert core.add(whole) is None
    expected = tokens(finish(core)["whole"])
    for done in (1, 5, 11):
        again = EngineRequest(f"again-{done}", [5, 6, 7], whole.sampling, output_ids=expected[:done])
        assert core.add(again) is None
        assert tokens(finish(core)[f"again-{done}"]) == expected[done:]
    over = core.add(EngineRequest("over", [5, 6, 7], whole.sampling, output_ids=expected))
    assert over is not None
    assert over.finish_reason == "length"


def test_stats_count_the_prompts(core: EngineCore) -> None:
    prompt = tuple(range(3, 43))
    for name in ("one", "two"):
        assert core.add(request(name, *prompt, num_tokens=2)) is None
        finish(core)
    stats = core.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.computed_tokens) == (80, 32, 48)
    assert stats.output_tokens == 4
    assert stats.steps == 4
    assert max(stats.step_time_ms.values()) > 0


def test_a_prefill_ends_without_tokens_and_the_next_request_finds_it(core: EngineCore) -> None:
    prompt = list(range(5, 70))
    hints = CallHints(call_class=CallClass.AHEAD)
    for name in ("ahead", "again"):
        core.add(EngineRequest(name, prompt, SamplingParams(max_tokens=1), hints=hints, prefill_only=True))
        outputs = finish(core)[name]
        assert tokens(outputs) == []
        assert (outputs[-1].finish_reason, outputs[-1].error) == ("length", None)
        assert outputs[0].cached_tokens == (0 if name == "ahead" else len(prompt))
    core.add(request("call", *prompt, 70))
    assert finish(core)["call"][0].cached_tokens == 64
    assert core.stats().ahead_tokens == len(prompt)


def test_claims_end_with_their_program_and_with_the_cache(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    def num_claims() -> int:
        retention = core._scheduler.kv_cache.retention
        assert retention is not None
        return retention.num_claims

    def run(name: str) -> None:
        hints = CallHints(program_id=name, reuse=(Reuse(None, 1),))
        core.add(EngineRequest(name, list(range(5, 70)), SamplingParams(max_tokens=2, temperature=0), hints=hints))
        finish(core)

    run("p")
    run("q")
    assert num_claims() == 2
    core.let_go(["p", "unknown"])
    assert num_claims() == 1
    monkeypatch.setattr(core._runner, "run", broken_at(1, core._runner.run, out_of_memory))
    run("broken")
    assert num_claims() == 0
    core.let_go(["q", "broken"])
    assert num_claims() == 0


def test_work_ahead_waits_for_the_calls_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    core = EngineCore(EngineConfig(dtype="float32", max_model_len=256, ahead_rows=0))
    inbox, outbox = SimpleQueue[Inbound](), SimpleQueue[Outbound]()
    thread = Thread(target=run_loop, args=(core, inbox, outbox.put), daemon=True)
    thread.start()

    def until_end_of(name: str) -> list[str]:
        """Who is heard of until that request has ended."""
        heard = []
        while True:
            match outbox.get(timeout=60):
                case Outputs(outputs):
                    heard += [output.request_id for output in outputs]
                    if any(output.request_id == name and output.finish_reason for output in outputs):
                        return heard

    ahead = replace(request("ahead", *range(5, 105)), prefill_only=True, hints=CallHints(call_class=CallClass.AHEAD))
    monkeypatch.setattr("macaw_server.engine.core.AHEAD_HOLD_S", 60.0)
    inbox.put(Add(ahead))
    assert until_end_of("ahead") == ["ahead"], "nothing was done before: nothing is about to follow"
    inbox.put(Add(request("first", 5, 6)))
    inbox.put(Add(replace(ahead, request_id="ahead-2", prompt_ids=list(range(105, 205)))))
    assert set(until_end_of("first")) == {"first"}
    inbox.put(Add(request("second", 7, 8)))
    assert set(until_end_of("second")) == {"second"}
    assert 59 < core.hold_s() <= 60
    monkeypatch.setattr("macaw_server.engine.core.AHEAD_HOLD_S", 0.0)
    inbox.put(GetStats())  # wakes it
    assert until_end_of("ahead-2") == ["ahead-2"]
    assert core.hold_s() == 0
    inbox.put(Stop())
    thread.join(60)
    assert not thread.is_alive()
