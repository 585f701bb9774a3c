"""Compiled equals native: prompts as the server saw them, outputs, chunks, events, traces; one program."""

from __future__ import annotations

import functools
import json
import operator
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import pytest
from chain_corpus import CASES, Case
from langchain_core.load import dumps
from langchain_core.runnables import Runnable
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_core.tracers.schemas import Run

from langchain_macaw import ChatMacaw, compile
from scripted_macaw_server import Recorder

_IDS = re.compile(r"(lc_)?run-+[0-9a-f-]{36}(-\d+)?|chatcmpl-\d+|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}")


def comparable(value: Any) -> Any:
    """`value` as JSON data without what differs between two runs: ids."""
    return json.loads(_IDS.sub("ID", dumps(value)))


def added_up(chunks: list[Any]) -> Any:
    return functools.reduce(operator.add, chunks)


def in_order(items: Iterable[tuple[int, Any]]) -> list[Any]:
    return sorted(items, key=operator.itemgetter(0))


def counted(items: list[Any]) -> Counter[str]:
    """Items in no order, for what parallel branches write side by side."""
    return Counter(json.dumps(item, sort_keys=True, default=str) for item in items)


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def once(value: Any) -> AsyncIterator[Any]:
    yield value


async def events(chain: Runnable[Any, Any], value: Any) -> Any:
    """Events by their kind, name and data."""
    seen = [event async for event in chain.astream_events(value, version="v2")]
    return counted([comparable([event["event"], event["name"], event["tags"], event["data"]]) for event in seen])


async def joined(chunks: AsyncIterator[Any]) -> Any:
    return added_up(await collect(chunks))


async def completed(chain: Runnable[Any, Any], value: Any) -> Any:
    return in_order(await collect(chain.abatch_as_completed([value, value])))


async def log(chain: Runnable[Any, Any], value: Any) -> Any:
    return added_up(await collect(chain.astream_log(value))).state["final_output"]


WAYS: dict[str, Callable[[Runnable[Any, Any], Any], Any]] = {
    "invoke": lambda chain, value: chain.invoke(value),
    "batch": lambda chain, value: chain.batch([value, value]),
    "batch_as_completed": lambda chain, value: in_order(chain.batch_as_completed([value, value])),
    "stream": lambda chain, value: added_up(list(chain.stream(value))),
    "transform": lambda chain, value: added_up(list(chain.transform(iter([value])))),
}
ASYNC_WAYS: dict[str, Callable[[Runnable[Any, Any], Any], Awaitable[Any]]] = {
    "ainvoke": lambda chain, value: chain.ainvoke(value),
    "abatch": lambda chain, value: chain.abatch([value, value]),
    "abatch_as_completed": completed,
    "astream": lambda chain, value: joined(chain.astream(value)),
    "atransform": lambda chain, value: joined(chain.atransform(once(value))),
    "astream_events": events,
    "astream_log": log,
}


# The quick run takes each chain one synchronous and one asynchronous way, and a few chains all ways.
REPRESENTATIVES = {"map_reduce_mustache", "assign", "duplicates"}
QUICK_WAYS = {"invoke", "astream"}


def cases(ways: Iterable[str]) -> list[Any]:
    return [
        pytest.param(
            case,
            way,
            id=f"{case.name}-{way}",
            marks=() if way in QUICK_WAYS or case.name in REPRESENTATIVES else pytest.mark.slow,
        )
        for case in CASES
        for way in ways
    ]


def check(case: Case, way: str, recorder: Recorder, native: Counter[str]) -> None:
    """What the server saw of a compiled run, against the prompts of the native run."""
    assert recorder.prompts == native
    assert native.total() == case.num_calls * (2 if "batch" in way else 1)
    assert recorder.requests == {"program": 1}
    assert not recorder.cancelled


@pytest.mark.parametrize(("case", "way"), cases(WAYS))
def test_same(case: Case, way: str, llm: ChatMacaw, recorder: Recorder) -> None:
    chain, run = case.build(llm), WAYS[way]
    expected, prompts = comparable(run(chain, case.input)), recorder.prompts
    recorder.clear()
    assert comparable(run(compile(chain), case.input)) == expected
    check(case, way, recorder, prompts)


@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
@pytest.mark.parametrize(("case", "way"), cases(ASYNC_WAYS))
async def test_same_async(case: Case, way: str, llm: ChatMacaw, recorder: Recorder) -> None:
    chain, run = case.build(llm), ASYNC_WAYS[way]
    expected, prompts = comparable(await run(chain, case.input)), recorder.prompts
    recorder.clear()
    assert comparable(await run(compile(chain), case.input)) == expected
    check(case, way, recorder, prompts)


def tree(run: Run) -> Any:
    """A trace without ids and times; children in no order, as branches run side by side."""
    children = sorted((tree(child) for child in run.child_runs), key=json.dumps)
    parameters = (run.extra or {}).get("invocation_params")
    return [
        run.name,
        run.run_type,
        sorted(run.tags or []),
        comparable([run.inputs, run.outputs, parameters]),
        children,
    ]


@pytest.mark.parametrize(("case", "way"), cases(["invoke", "ainvoke"]))
async def test_same_trace(case: Case, way: str, llm: ChatMacaw) -> None:
    chain = case.build(llm)

    async def trace(chain: Runnable[Any, Any]) -> list[Any]:
        collector = RunCollectorCallbackHandler()
        config = {"callbacks": [collector], "tags": ["root"], "run_name": "the run"}
        _ = chain.invoke(case.input, config) if way == "invoke" else await chain.ainvoke(case.input, config)
        return [tree(run) for run in collector.traced_runs]

    native = await trace(chain)
    assert len(native) == 1
    assert await trace(compile(chain)) == native  # and no stray root runs from planning
