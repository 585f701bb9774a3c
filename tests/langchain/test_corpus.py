"""Compiled equals native: prompts as the server saw them, outputs, chunks, events and traces; one program each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from chain_corpus import CASES, Case
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_macaw import ChatMacaw, compile
from scripted_macaw_server import Recorder

pytestmark = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def plain(value: Any) -> Any:
    """`value` without what differs between two runs: ids."""
    match value:
        case BaseMessage():
            metadata = {k: v for k, v in value.response_metadata.items() if k != "id"}
            return type(value), value.model_copy(update={"id": None, "response_metadata": metadata})
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    return value


class Both:
    """A chain and its compiled form, run one after the other on the same server."""

    def __init__(self, case: Case, llm: ChatMacaw, recorder: Recorder) -> None:
        self.case, self.recorder = case, recorder
        self.native = case.build(llm)
        self.compiled = compile(self.native)

    def begin(self) -> None:
        self.recorder.clear()

    def check_requests(self, prompts: Counter[str], num_inputs: int = 1) -> None:
        assert self.recorder.prompts == prompts
        assert prompts.total() == self.case.num_calls * num_inputs
        assert self.recorder.requests == {"program": 1}
        assert not self.recorder.cancelled


@pytest.fixture
def both(case: Case, llm: ChatMacaw, recorder: Recorder) -> Both:
    return Both(case, llm, recorder)


def test_invoke(both: Both) -> None:
    expected = both.native.invoke(both.case.input)
    prompts = both.recorder.prompts
    both.begin()
    assert plain(both.compiled.invoke(both.case.input)) == plain(expected)
    both.check_requests(prompts)
