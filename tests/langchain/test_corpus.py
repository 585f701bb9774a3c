"""Compiled equals native: prompts as the server saw them, outputs, exceptions, chunks, events, traces, interface."""

from __future__ import annotations

import copy
import functools
import json
import operator
import pickle
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import pytest
from chain_corpus import CASES, Case
from chain_corpus_documents import DOCUMENT_CASES
from chain_corpus_steps import STEP_CASES
from langchain_core.load import dumps
from langchain_core.runnables import Runnable
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_core.tracers.schemas import Run

from langchain_macaw import ChatMacaw, compile
from scripted_macaw_server import Recorder

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning")

_IDS = re.compile(
    r"(lc_)?run-+[0-9a-f-]{36}(-\d+)?|chatcmpl-\d+|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}|0x[0-9a-f]{8,}"
    r"|(?<=call #)\d+"
)
BAD = {"no": "variable that a prompt asks for"}


def comparable(value: Any) -> Any:
    """`value` as JSON data without what differs between two runs: ids, programs, times, an error's HTTP headers."""
    return json.loads(_IDS.sub("ID", dumps(value)), object_hook=_without_facts)


def _without_facts(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("program_id", "timings", "headers")}


def raised(error: BaseException) -> dict[str, str]:
    """An exception, for comparing; so are those of which a group is made."""
    return {"raised": type(error).__name__, "message": _IDS.sub("ID", str(error))}


def results(outputs: list[Any]) -> list[Any]:
    return [raised(output) if isinstance(output, Exception) else output for output in outputs]


def added_up(chunks: list[Any]) -> Any:
    """The sum of chunks as LangChain makes it: where they do not add up, the last one counts."""

    def add(total: Any, chunk: Any) -> Any:
        try:
            return total + chunk
        except TypeError:
            return chunk

    return functools.reduce(add, chunks)


def in_order(items: Iterable[tuple[int, Any]]) -> list[Any]:
    return results([output for _, output in sorted(items, key=operator.itemgetter(0))])


def counted(items: list[Any]) -> Counter[str]:
    """Items in no order, for what parallel branches write side by side."""
    return Counter(json.dumps(item, sort_keys=True, default=str) for item in items)


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def once(value: Any) -> AsyncIterator[Any]:
    yield value


async def events(chain: Runnable[Any, Any], value: Any) -> Any:
    """Events by their kind, name, tags, metadata and data."""
    seen = [event async for event in chain.astream_events(value, version="v2")]
    return counted(
        [comparable([event["event"], event["name"], event["tags"], event["metadata"], event["data"]]) for event in seen]
    )


async def joined(chunks: AsyncIterator[Any]) -> Any:
    return added_up(await collect(chunks))


async def completed(chain: Runnable[Any, Any], value: Any) -> Any:
    return in_order(await collect(chain.abatch_as_completed([value, value], return_exceptions=True)))


async def log(chain: Runnable[Any, Any], value: Any) -> Any:
    return added_up(await collect(chain.astream_log(value))).state["final_output"]


async def batched(chain: Runnable[Any, Any], value: Any) -> Any:
    return results(await chain.abatch([value, BAD, value], {"max_concurrency": 2}, return_exceptions=True))


WAYS: dict[str, Callable[[Runnable[Any, Any], Any], Any]] = {
    "invoke": lambda chain, value: chain.invoke(value),
    "batch": lambda chain, value: chain.batch([value, value]),
    "batch_with_exceptions": lambda chain, value: results(
        chain.batch([value, BAD, value], {"max_concurrency": 2}, return_exceptions=True)
    ),
    "batch_as_completed": lambda chain, value: in_order(
        chain.batch_as_completed([value, value], return_exceptions=True)
    ),
    "stream": lambda chain, value: added_up(list(chain.stream(value))),
    "transform": lambda chain, value: added_up(list(chain.transform(iter([value])))),
}
ASYNC_WAYS: dict[str, Callable[[Runnable[Any, Any], Any], Awaitable[Any]]] = {
    "ainvoke": lambda chain, value: chain.ainvoke(value),
    "abatch": lambda chain, value: chain.abatch([value, value]),
    "abatch_with_exceptions": batched,
    "abatch_as_completed": completed,
    "astream": lambda chain, value: joined(chain.astream(value)),
    "atransform": lambda chain, value: joined(chain.atransform(once(value))),
    "astream_events": events,
    "astream_log": log,
}
ALL_CASES = [*CASES, *STEP_CASES, *DOCUMENT_CASES]

# The quick run takes each chain one synchronous and one asynchronous way, and a few chains all ways.
REPRESENTATIVES = {"map_reduce_mustache", "duplicates", "functions_and_calls_in_turn", "failing_function"}
QUICK_WAYS = {"invoke", "astream"}


def cases(ways: Iterable[str]) -> list[Any]:
    return [
        pytest.param(
            case,
            way,
            id=f"{case.name}-{way}",
            marks=() if way in QUICK_WAYS or case.name in REPRESENTATIVES else pytest.mark.slow,
        )
        for case in ALL_CASES
        for way in ways
        if not (case.sequential and "batch" in way)
    ]


def check(case: Case, way: str, recorder: Recorder, native: Counter[str]) -> None:
    """What the server saw of a compiled run, against the prompts of the native run."""
    if "exceptions" in way or case.raises:
        return  # which calls come before an exception is a matter of chance
    assert recorder.prompts == native
    assert native.total() == case.num_calls * (2 if "batch" in way else 1)
    if case.static:
        assert recorder.requests == {"program": 1}
        assert not recorder.cancelled


@pytest.mark.parametrize(("case", "way"), cases(WAYS))
def test_same(case: Case, way: str, llm: ChatMacaw, recorder: Recorder) -> None:
    def outcome(chain: Runnable[Any, Any]) -> Any:
        try:
            return comparable(WAYS[way](chain, copy.deepcopy(case.input)))
        except Exception as error:
            return raised(error)

    expected, prompts = outcome(case.build(llm)), recorder.prompts
    assert way != "invoke" or case.raises == _is_raised(expected), expected
    recorder.clear()
    assert outcome(compile(case.build(llm))) == expected
    if not _is_raised(expected):
        check(case, way, recorder, prompts)


@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
@pytest.mark.parametrize(("case", "way"), cases(ASYNC_WAYS))
async def test_same_async(case: Case, way: str, llm: ChatMacaw, recorder: Recorder) -> None:
    async def outcome(chain: Runnable[Any, Any]) -> Any:
        try:
            return comparable(await ASYNC_WAYS[way](chain, copy.deepcopy(case.input)))
        except Exception as error:
            return raised(error)

    expected, prompts = await outcome(case.build(llm)), recorder.prompts
    if _is_raised(expected) and expected["raised"] == "NotImplementedError":
        pytest.skip(f"LangChain: {expected['message']}")
    recorder.clear()
    assert await outcome(compile(case.build(llm))) == expected
    if not _is_raised(expected):
        check(case, way, recorder, prompts)


def _is_raised(outcome: Any) -> bool:
    return isinstance(outcome, dict) and "raised" in outcome


def tree(run: Run) -> Any:
    """A trace without ids and times; children in no order, as branches run side by side."""
    children = sorted((tree(child) for child in run.child_runs), key=json.dumps)
    extra = run.extra or {}
    return [
        run.name,
        run.run_type,
        sorted(run.tags or []),
        (run.error or "").split("\n")[0],  # behind it is a traceback
        comparable([run.inputs, run.outputs, extra.get("invocation_params"), extra.get("metadata")]),
        children,
    ]


@pytest.mark.parametrize(("case", "way"), cases(["invoke", "ainvoke"]))
async def test_same_trace(case: Case, way: str, llm: ChatMacaw) -> None:
    async def trace(chain: Runnable[Any, Any]) -> list[Any]:
        collector = RunCollectorCallbackHandler()
        config: Any = {"callbacks": [collector], "tags": ["root"], "metadata": {"a": 1}, "run_name": "the run"}
        try:
            _ = (
                chain.invoke(copy.deepcopy(case.input), config)
                if way == "invoke"
                else await chain.ainvoke(copy.deepcopy(case.input), config)
            )
        except Exception:
            if not case.raises:
                raise
        return [tree(run) for run in collector.traced_runs]

    native = await trace(case.build(llm))
    assert native
    assert await trace(compile(case.build(llm))) == native  # and no stray root runs from planning


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_same_interface(case: Case, llm: ChatMacaw) -> None:
    chain = case.build(llm)
    compiled = compile(chain)
    assert compiled.get_name() == chain.get_name()
    assert compiled.get_input_jsonschema() == chain.get_input_jsonschema()
    assert compiled.get_output_jsonschema() == chain.get_output_jsonschema()
    assert compiled.get_graph().draw_mermaid() == chain.get_graph().draw_mermaid()
    assert [spec.id for spec in compiled.config_specs] == [spec.id for spec in chain.config_specs]
    try:
        pickled = pickle.dumps(chain)
    except Exception as error:
        with pytest.raises(type(error)):
            pickle.dumps(compiled)
    else:
        assert type(pickle.loads(pickle.dumps(compiled)).bound) is type(pickle.loads(pickled))
