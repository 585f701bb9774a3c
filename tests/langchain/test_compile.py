"""`compile` where a chain is not all calls and templates, where something fails, what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from chain_corpus import CHUNKS, TEXT, chat, map_reduce_mustache, parallel
from langchain_core.caches import InMemoryCache
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.runnables import (
    Runnable,
    RunnableBranch,
    RunnableGenerator,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_core.tools import tool

import langchain_macaw
from langchain_macaw import ChatMacaw, compile
from langchain_macaw.compile import CompiledChain
from langchain_macaw.lowering import Lowering
from langchain_macaw.plan import CURRENT_PLAN
from scripted_macaw_server import Recorder


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    assert CURRENT_PLAN.get() is None
    assert "macaw-program" not in {thread.name for thread in threading.enumerate()}


def test_exports() -> None:
    assert langchain_macaw.__all__ == ["ChatMacaw", "compile"]


# -----------------------------------------------------------------------------------------------------------
# Client steps


class Count:
    """How often each client step ran."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()

    def step(self, name: str) -> RunnableLambda[Any, Any]:
        def run(value: Any) -> Any:
            self.ran[name] += 1
            return value

        return RunnableLambda(run)


def upper(text: Iterator[str]) -> Iterator[str]:
    for chunk in text:
        yield chunk.upper()


@tool
def shout(text: str) -> str:
    """Say it louder."""
    return f"{text}!"


def client_chains(llm: ChatMacaw, count: Count) -> dict[str, tuple[Runnable[Any, Any], int]]:
    """Chains with client steps, and how many of their calls can be planned."""
    ask = chat("Ask {x}") | llm | TEXT
    branch = RunnableBranch((lambda x: "zzz" in x, chat("No {x}") | llm), chat("Yes {x}") | llm)
    return {
        "before": (count.step("a") | ask, 0),
        "behind": (ask | count.step("a"), 1),
        "between": (ask | count.step("a") | chat("Then {y}") | llm | TEXT | count.step("b"), 1),
        "beside": (RunnableParallel(x=ask, c=count.step("a")) | chat("{x} {c}") | llm, 1),
        "unused": (RunnableParallel(x=ask, c=count.step("a")) | chat("Only {x}") | llm, 2),
        "assigned": (RunnablePassthrough.assign(c=count.step("a")) | chat("{x}: {c}") | llm, 0),
        "in_a_map": ((ask | count.step("a") | chat("Then {y}") | llm).map(), 2),
        "before_a_map": (count.step("a") | ask.map(), 0),
        "generator": (ask | RunnableGenerator(upper) | chat("Louder {y}") | llm, 1),
        "tool": (ask | (lambda text: {"text": text}) | shout | chat("Tool {y}") | llm, 1),
        "branch": (ask | branch | TEXT | count.step("a"), 1),
        "json": (chat("{x} as JSON") | llm | JsonOutputParser() | chat("{name}, {length}") | llm, 1),
        "template_that_reads": (ask | chat("{{ y | upper }} {{ y | length }}", "jinja2") | llm, 1),
    }


INPUTS: dict[str, Any] = {"in_a_map": [{"x": "1"}, {"x": "2"}], "before_a_map": [{"x": "1"}, {"x": "2"}]}


@pytest.mark.parametrize("name", client_chains(ChatMacaw(model="m"), Count()))
def test_client_steps_run_once(name: str, llm: ChatMacaw, recorder: Recorder) -> None:
    count = Count()
    chain, num_planned = client_chains(llm, count)[name]
    value = INPUTS.get(name, {"x": "1"})
    expected = chain.invoke(value)
    native, prompts = count.ran, recorder.prompts
    count.ran = Counter()
    recorder.clear()
    output = compile(chain).invoke(value)
    assert TEXT.map().invoke(output if isinstance(output, list) else [output]) == TEXT.map().invoke(
        expected if isinstance(expected, list) else [expected]
    )
    assert count.ran == native
    assert recorder.prompts == prompts
    assert recorder.requests["chat"] == prompts.total() - num_planned
    assert recorder.requests["program"] == (num_planned > 0)
    assert sum(len(program.calls) for program in recorder.programs) == num_planned


def test_whole_message_in_text_is_left_to_native_execution(
    llm: ChatMacaw, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    chain = compile(chat("Ask {x}") | llm | chat("Repr {y}") | llm)
    chain.batch([{"x": "1"}, {"x": "2"}])
    assert recorder.requests == {"program": 1, "chat": 2}
    assert caplog.text.count("Put StrOutputParser() behind the model") == 1


# -----------------------------------------------------------------------------------------------------------
# The program


def test_program_of_a_map_reduce(llm: ChatMacaw, recorder: Recorder) -> None:
    compile(map_reduce_mustache(llm)).invoke(CHUNKS, {"max_concurrency": 2, "run_name": "mine"})
    (program,) = recorder.programs
    assert [call.id for call in program.calls] == [f"/summaries[{i}]-{i}" for i in range(5)] + ["call-5"]
    assert program.calls[-1].inputs == [f"v{i}" for i in range(5)]
    assert [target.variable for target in program.targets] == ["v5"]
    assert program.max_concurrency == 2
    assert not program.transforms


def test_targets_are_what_comes_out_and_what_client_steps_wait_for(llm: ChatMacaw, recorder: Recorder) -> None:
    draft = RunnablePassthrough.assign(draft=chat("Draft {x}") | llm | TEXT)
    compile(
        draft
        | RunnablePassthrough.assign(final=chat("Final {draft}") | llm | TEXT)
        | RunnablePassthrough.assign(other=chat("Other {draft}") | llm | JsonLike())
    ).invoke({"x": "1"})
    assert [target.variable for target in recorder.programs[0].targets] == ["v0", "v1", "v2"]


class JsonLike(RunnablePassthrough[Any]):
    """A client step: it has its own `invoke`."""

    def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
        return {"text": input.content}


def test_batch_of_different_inputs_and_configs_is_one_program(llm: ChatMacaw, recorder: Recorder) -> None:
    chain = chat("{x}") | llm | TEXT | chat("Again {y}") | llm | TEXT
    inputs, configs = [{"x": str(i)} for i in range(3)], [{"tags": [str(i)]} for i in range(3)]
    assert compile(chain).batch(inputs, configs) == chain.batch(inputs, configs)
    assert recorder.requests["program"] == 1
    assert len(recorder.programs[0].calls) == 6
    assert compile(chain).batch([]) == []


def test_call_arguments_reach_the_first_step(llm: ChatMacaw, recorder: Recorder) -> None:
    message = compile(llm).invoke("Hello you there", stop=["Hello"])
    assert message.content == llm.invoke("Hello you there", stop=["Hello"]).content
    assert recorder.requests == {"program": 1, "chat": 1}
    assert all('"stop": ["Hello"]' in prompt for prompt in recorder.prompts)


def test_other_server_is_not_part_of_the_program(llm: ChatMacaw, recorder: Recorder) -> None:
    other = ChatMacaw(model="m", base_url=llm.openai_api_base, api_key="another-tenant")
    compile(chat("Ask {x}") | llm | TEXT | chat("Other {y}") | other).invoke({"x": "1"})
    assert recorder.requests == {"program": 1, "chat": 1}


@pytest.mark.parametrize("payload", [{"tools": [{}]}, {"extra_headers": {"a": "b"}}, {"reasoning_effort": "low"}])
def test_request_that_the_protocol_does_not_have_is_not_planned(
    payload: dict[str, Any], llm: ChatMacaw, recorder: Recorder
) -> None:
    with contextlib.suppress(openai.BadRequestError):
        compile(chat("Ask {x}") | llm.bind(**payload)).invoke({"x": "1"})
    assert recorder.requests == {"chat": 1}


def test_compiled_inside_compiled_is_one_program(llm: ChatMacaw, recorder: Recorder) -> None:
    inner = compile(chat("Inner {x}") | llm | TEXT)
    compile(inner | chat("Outer {y}") | llm).invoke({"x": "1"})
    assert recorder.requests == {"program": 1}


def test_compiled_inside_a_client_step_has_its_own_program(llm: ChatMacaw, recorder: Recorder) -> None:
    inner = compile(chat("Inner {x}") | llm | TEXT)
    compile(chat("Outer {x}") | llm | TEXT | RunnableLambda(lambda text: inner.invoke({"x": text}))).invoke({"x": "1"})
    assert recorder.requests == {"program": 2}


def test_answer_in_langchains_cache_is_not_asked_for(server_url: str, recorder: Recorder) -> None:
    llm = ChatMacaw(model="m", base_url=server_url, cache=InMemoryCache())
    chain = compile(chat("Ask {x}") | llm | TEXT | chat("Then {y}") | llm | TEXT)
    first = chain.invoke({"x": "1"})
    assert recorder.requests == {"program": 1}
    assert chain.invoke({"x": "1"}) == first
    assert recorder.requests == {"program": 1}


def test_empty_answer_is_a_miss_not_a_different_result(llm: ChatMacaw, recorder: Recorder) -> None:
    """Templates are rendered for answers that say something."""
    silent = llm.bind(stop=[" ", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "a", "b", "c", "d", "e"])
    chain = chat("{x}") | silent | TEXT | chat("{% if y %}Yes {{ y }}{% else %}No{% endif %}", "jinja2") | llm | TEXT
    expected = chain.invoke({"x": "1"})
    recorder.clear()
    assert compile(chain).invoke({"x": "1"}) == expected


# -----------------------------------------------------------------------------------------------------------
# Failure


@pytest.mark.parametrize("way", ["invoke", "stream", "ainvoke", "astream"])
async def test_failed_call_raises_what_it_raises_natively(way: str, llm: ChatMacaw, recorder: Recorder) -> None:
    chain = RunnableParallel(a=chat("{x} TOOLONG") | llm, b=chat("{x}") | llm) | chat("{a}{b}") | llm

    async def start(chain: Runnable[Any, Any]) -> None:
        match way:
            case "invoke":
                chain.invoke({"x": "1"})
            case "stream":
                list(chain.stream({"x": "1"}))
            case "ainvoke":
                await chain.ainvoke({"x": "1"})
            case "astream":
                _ = [chunk async for chunk in chain.astream({"x": "1"})]

    async def run(chain: Runnable[Any, Any]) -> openai.APIStatusError:
        with pytest.raises(openai.BadRequestError) as caught:
            await start(chain)
        return caught.value

    native, compiled = await run(chain), await run(compile(chain))
    assert type(compiled) is type(native)
    assert str(compiled) == str(native)
    assert (compiled.code, compiled.body, compiled.status_code) == (
        native.code,
        native.body,
        native.status_code,
    )
    assert recorder.requests["program"] == 1


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_batch_returns_exceptions_in_place(asynchronous: bool, llm: ChatMacaw, recorder: Recorder) -> None:
    chain = compile(chat("Ask {x}") | llm | TEXT | chat("Then {y}") | llm | TEXT)
    inputs = [{"x": "1"}, {"x": "TOOLONG"}, {"no": "x"}, {"x": "3"}]
    if asynchronous:
        outputs = await chain.abatch(inputs, return_exceptions=True)
    else:
        outputs = chain.batch(inputs, return_exceptions=True)
    kinds = (str, openai.BadRequestError, KeyError, str)
    assert all(isinstance(output, kind) for output, kind in zip(outputs, kinds, strict=True)), outputs
    assert recorder.requests == {"program": 1}
    assert recorder.prompts.total() == 5


def test_failure_that_openai_retries_is_retried_by_an_ordinary_request(llm: ChatMacaw, recorder: Recorder) -> None:
    assert compile(chat("{x} FLAKY") | llm | TEXT).invoke({"x": "1"})
    assert recorder.requests == {"program": 1, "chat": 1}


def test_fallback_runs_natively_when_the_planned_call_fails(server_url: str, recorder: Recorder) -> None:
    llm = ChatMacaw(model="m", base_url=server_url, max_retries=0)
    chain = (chat("{x} FLAKY") | llm).with_fallbacks([chat("Instead {x}") | llm]) | TEXT | chat("Then {y}") | llm | TEXT
    expected = chain.invoke({"x": "1"})
    recorder.clear()
    assert compile(chain).invoke({"x": "1"}) == expected
    assert recorder.requests == {"program": 1, "chat": 2}


def test_retry_runs_natively_when_the_planned_call_fails(server_url: str, recorder: Recorder) -> None:
    llm = ChatMacaw(model="m", base_url=server_url, max_retries=0)
    first = (chat("{x} FLAKY") | llm).with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
    assert compile(first | TEXT).invoke({"x": "1"})
    assert recorder.requests == {"program": 1, "chat": 1}


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_server_without_programs_gets_ordinary_requests(
    asynchronous: bool, llm: ChatMacaw, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    chain = compile(parallel(llm))
    recorder.down = True
    assert await chain.ainvoke({"topic": "x"}) if asynchronous else chain.invoke({"topic": "x"})
    assert recorder.requests == {"program": 1, "chat": 4}
    assert caplog.text.count("The chain's program was lost") == 1


def test_no_server_raises_what_it_raises_natively() -> None:
    llm = ChatMacaw(model="m", base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(openai.APIConnectionError):
        compile(chat("{x}") | llm | chat("{y}") | llm).invoke({"x": "1"})


def test_planner_failure_runs_natively_and_says_so_once(
    llm: ChatMacaw, recorder: Recorder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lowering, "plan", lambda *args, **kwargs: 1 / 0)
    chain = compile(chat("{x}") | llm | TEXT)
    assert chain.invoke({"x": "1"}) == chain.invoke({"x": "1"})
    assert recorder.requests == {"chat": 2}
    assert caplog.text.count("planning failed with ZeroDivisionError") == 1


# -----------------------------------------------------------------------------------------------------------
# Leaving early


def held(llm: ChatMacaw) -> Runnable[Any, Any]:
    """One branch answers; the other one hangs, and a third call waits for it."""
    hanging = chat("{x} HOLD") | llm | TEXT | chat("After {y}") | llm | TEXT
    return RunnableParallel(quick=chat("{x}") | llm | TEXT, hanging=hanging)


def test_closed_stream_cancels_the_program(llm: ChatMacaw, recorder: Recorder) -> None:
    stream = compile(held(llm)).stream({"x": "1"})
    assert "quick" in next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert recorder.cancelled == ["prog-1"]
    assert recorder.requests == {"program": 1}


async def test_closed_async_stream_cancels_the_program(llm: ChatMacaw, recorder: Recorder) -> None:
    stream = compile(held(llm)).astream({"x": "1"})
    assert "quick" in await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await asyncio.to_thread(recorder.cancellation.wait, 10)
    assert recorder.cancelled == ["prog-1"]
    assert recorder.requests == {"program": 1}


async def test_cancelled_task_cancels_the_program(llm: ChatMacaw, recorder: Recorder) -> None:
    started = asyncio.Event()
    chain = RunnableParallel(
        a=chat("{x} HOLD") | llm, b=chat("{x}") | llm | TEXT | RunnableLambda(lambda _: started.set())
    )
    task = asyncio.create_task(compile(chain).ainvoke({"x": "1"}))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(recorder.cancellation.wait, 10)
    assert recorder.requests == {"program": 1}


async def test_error_at_the_root_cancels_the_program(llm: ChatMacaw, recorder: Recorder) -> None:
    """The hanging branch outlives the run in a task of its own; it must not go on with ordinary requests."""
    failing = chat("{x}") | llm | TEXT | RunnableLambda(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await compile(RunnableParallel(failing=failing, hanging=held(llm))).ainvoke({"x": "1"})
    await asyncio.to_thread(recorder.cancellation.wait, 10)
    assert recorder.cancelled == ["prog-1"]
    assert recorder.requests == {"program": 1}


def test_unused_part_of_a_program_is_cancelled(server_url: str, recorder: Recorder) -> None:
    """The step fails before it comes to its hanging call."""
    llm = ChatMacaw(model="m", base_url=server_url)
    chain = chat("{x}") | llm | TEXT | RunnablePassthrough(lambda _: 1 / 0) | chat("{y} HOLD") | llm
    with pytest.raises(ZeroDivisionError):
        compile(chain).invoke({"x": "1"})
    assert recorder.cancelled == ["prog-1"]


# -----------------------------------------------------------------------------------------------------------
# The wrapper


def test_interface_is_the_chains(llm: ChatMacaw) -> None:
    chain = parallel(llm).with_config(run_name="mine")
    compiled = compile(chain)
    assert compiled.get_input_jsonschema() == chain.get_input_jsonschema()
    assert compiled.get_output_jsonschema() == chain.get_output_jsonschema()
    assert compiled.get_graph().draw_mermaid() == chain.get_graph().draw_mermaid()
    assert compiled.get_name() == chain.get_name()
    assert compile(compiled) is compiled
    assert isinstance(compile({"a": llm}), CompiledChain)


def test_pickled_chain_runs(llm: ChatMacaw, recorder: Recorder) -> None:
    chain = compile(parallel(llm))
    expected = chain.invoke({"topic": "x"})
    assert pickle.loads(pickle.dumps(chain)).invoke({"topic": "x"}) == expected
    assert recorder.requests == {"program": 2}


def test_wrapped_further_it_is_still_compiled(llm: ChatMacaw, recorder: Recorder) -> None:
    chain = compile(chat("{x}") | llm.with_config(tags=["a"]) | TEXT | chat("{y}") | llm)
    wrapped = chain.with_config(tags=["b"]).with_retry() | TEXT
    assert wrapped.invoke({"x": "1"})
    assert list(chain.bind().stream({"x": "1"}))
    assert recorder.requests == {"program": 2}


async def test_async_generator_is_closed_in_another_context(llm: ChatMacaw, recorder: Recorder) -> None:
    """A ContextVar that was set in one task cannot be reset in another one."""
    stream = compile(chat("{x}") | llm | TEXT).astream({"x": "1"})
    await asyncio.create_task(_take_one(stream))
    await asyncio.create_task(stream.aclose())  # type: ignore[attr-defined]
    assert recorder.requests == {"program": 1}


async def _take_one(stream: AsyncIterator[Any]) -> Any:
    return await anext(stream)


async def test_sync_steps_of_an_async_chain_answer_from_the_plan(llm: ChatMacaw, recorder: Recorder) -> None:
    """A model that is used from a thread reads a plan that the event loop fills."""
    ask = chat("Ask {x}") | llm | TEXT
    chain = RunnableParallel(a=ask, b=RunnableLambda(lambda value: ask.invoke(value)))
    output = await compile(chain).ainvoke({"x": "1"})
    assert output["a"] == output["b"]
    assert recorder.requests == {"program": 1, "chat": 1}
    assert sorted(recorder.prompts.values()) == [2]


def test_async_steps_of_a_sync_chain_answer_from_the_plan(llm: ChatMacaw, recorder: Recorder) -> None:
    """An event loop inside a step reads a plan that a thread fills."""
    ask = chat("Ask {x}") | llm | TEXT
    in_a_loop = RunnableLambda(lambda value: asyncio.run(ask.ainvoke(value)))
    chain = RunnableParallel(a=ask | RunnableLambda(lambda _: None), b=in_a_loop, c=ask)
    assert compile(chain).invoke({"x": "1"})["b"]
    assert recorder.prompts.total() == 3
    assert recorder.requests == {"program": 1, "chat": 1}
