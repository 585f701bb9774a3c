"""`QueryPipeline`, compiled against plain. It exists up to llama-index-core 0.12."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("llama_index.core.query_pipeline") is None:
    pytest.skip("llama-index-core has no QueryPipeline since 0.13", allow_module_level=True)

from llama_index.core import PromptTemplate
from llama_index.core.query_pipeline import (  # type: ignore[import-not-found]
    ArgPackComponent,
    FnComponent,
    InputComponent,
    Link,
    QueryPipeline,
)
from llama_index.core.response_synthesizers import TreeSummarize

from llama_index.llms.macaw import Macaw, autocompile, compile
from llama_index_macaw.observing import Bench, FixedRetriever, run_async
from scripted_macaw_server import Recorder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NAME, JUDGE, END = (PromptTemplate(text) for text in ("Name {x}.", "Judge {y}.", "End {z}."))
Build = Callable[[Macaw], QueryPipeline]


def shout(text: Any) -> str:
    return str(text).upper()


def chain(llm: Macaw) -> QueryPipeline:
    return QueryPipeline(chain=[NAME, llm, JUDGE, llm, END, llm])


def fan_out_and_merge(llm: Macaw) -> QueryPipeline:
    pipeline = QueryPipeline()
    pipeline.add_modules({"input": InputComponent(), "merge": PromptTemplate("Merge {a}, {b}, {c}."), "last": llm})
    for name in "abc":
        pipeline.add_modules({f"prompt {name}": PromptTemplate(f"{name}: {{x}}"), f"llm {name}": llm})
        pipeline.add_link("input", f"prompt {name}", src_key="x", dest_key="x")
        pipeline.add_link(f"prompt {name}", f"llm {name}")
        pipeline.add_link(f"llm {name}", "merge", dest_key=name)
    pipeline.add_link("merge", "last")
    return pipeline


def function_in_the_middle(llm: Macaw) -> QueryPipeline:
    return QueryPipeline(
        chain=[NAME, llm, JUDGE, llm, FnComponent(fn=shout), END, llm, PromptTemplate("Sum {s}."), llm]
    )


def function_beside(llm: Macaw) -> QueryPipeline:
    """One branch goes through a function, the other one is known ahead to its end."""
    return QueryPipeline(
        modules={
            "input": InputComponent(),
            "name": NAME,
            "named": llm,
            "shout": FnComponent(fn=shout),
            "judge": JUDGE,
            "judged": llm,
            "merge": PromptTemplate("Merge {a} and {b}."),
            "last": llm,
        },
        links=[
            Link("input", "name", src_key="x", dest_key="x"),
            Link("name", "named"),
            Link("named", "shout"),
            Link("input", "judge", src_key="x", dest_key="y"),
            Link("judge", "judged"),
            Link("shout", "merge", dest_key="a"),
            Link("judged", "merge", dest_key="b"),
            Link("merge", "last"),
        ],
    )


def function_on_a_link(llm: Macaw) -> QueryPipeline:
    pipeline = QueryPipeline(modules={"name": NAME, "named": llm, "judge": JUDGE, "judged": llm})
    pipeline.add_link("name", "named")
    pipeline.add_link("named", "judge", input_fn=shout)
    pipeline.add_link("judge", "judged")
    return pipeline


def condition_on_a_link(llm: Macaw) -> QueryPipeline:
    pipeline = QueryPipeline(
        modules={"name": NAME, "named": llm, "judge": JUDGE, "judged": llm, "end": END, "ended": llm}
    )
    pipeline.add_link("name", "named")
    pipeline.add_link("named", "judge", condition_fn=lambda answer: "never" in str(answer))
    pipeline.add_link("named", "end", condition_fn=lambda answer: "never" not in str(answer))
    pipeline.add_link("judge", "judged")
    pipeline.add_link("end", "ended")
    return pipeline


def pack(llm: Macaw) -> QueryPipeline:
    return QueryPipeline(chain=[NAME, llm, ArgPackComponent(), FnComponent(fn=lambda items: str(items)), END, llm])


CASES: dict[str, tuple[Build, int, int]] = {
    "chain": (chain, 3, 1),
    "fan-out and merge": (fan_out_and_merge, 4, 1),
    "function in the middle": (function_in_the_middle, 4, 2),
    "function beside": (function_beside, 3, 2),
    "function on a link": (function_on_a_link, 2, 2),
    "condition on a link": (condition_on_a_link, 2, 2),
}


@pytest.fixture
def bench(recorder: Recorder) -> Bench:
    return Bench(recorder)


@pytest.fixture(params=[True, False], ids=["chat", "completion"])
def model(request: pytest.FixtureRequest, server_url: str) -> Macaw:
    return Macaw(
        model="m",
        api_base=server_url,
        is_chat_model=request.param,
        is_function_calling_model=False,
        context_window=1000,
        max_tokens=64,
        max_retries=0,
    )


def running(pipeline: QueryPipeline, asynchronous: bool, **kwargs: Any) -> Callable[[], Any]:
    def run() -> str:
        output = run_async(pipeline.arun(**kwargs)) if asynchronous else pipeline.run(**kwargs)
        return str(output)

    return run


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_plain(case: str, asynchronous: bool, model: Macaw, bench: Bench, recorder: Recorder) -> None:
    build, num_calls, num_programs = CASES[case]
    pipeline = build(model)
    pipeline.callback_manager = bench.callback_manager
    expected = bench.observe(running(pipeline, asynchronous, x="a macaw"))
    assert expected.error is None
    assert recorder.requests.total() == num_calls
    actual = bench.observe(running(compile(pipeline), asynchronous, x="a macaw"))
    if asynchronous:
        expected, actual = expected.in_any_order(), actual.in_any_order()
    assert actual == expected
    assert recorder.requests == {"program": num_programs}


def test_branches_run_at_the_same_time(model: Macaw, recorder: Recorder) -> None:
    compile(fan_out_and_merge(model)).run(x="a macaw")
    assert recorder.peak == 3


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_batch(asynchronous: bool, model: Macaw, bench: Bench, recorder: Recorder) -> None:
    run = running(chain(model), asynchronous, x=["one", "two", "three"], batch=True)
    expected = bench.observe(run).in_any_order()
    assert expected.error is None
    run = running(compile(chain(model)), asynchronous, x=["one", "two", "three"], batch=True)
    actual = bench.observe(run).in_any_order()
    assert (actual.result, actual.prompts) == (expected.result, expected.prompts)
    assert recorder.requests == {"program": 3}


def test_a_synthesizer_inside(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    """It is a component like any other, and has a program of its own if it is compiled itself."""

    def build(synthesizer: Any) -> QueryPipeline:
        pipeline = QueryPipeline(modules={"retrieve": FixedRetriever(["nuts " * 900]), "synthesize": synthesizer})
        pipeline.add_link("retrieve", "synthesize", dest_key="nodes")
        return pipeline

    plain, compiled = build(TreeSummarize(llm=model)), build(compile(TreeSummarize(llm=model)))
    inputs = {"retrieve": {"input": "What?"}, "synthesize": {"query_str": "What?"}}
    for pipeline in (plain, compiled):
        pipeline.module_dict["synthesize"].partial(query_str="What?")
    del inputs["synthesize"]
    expected = str(plain.run_multi(inputs))
    assert recorder.requests.total() == 3
    recorder.clear()
    assert str(compile(compiled).run_multi(inputs)) == expected
    assert recorder.requests == {"program": 1}


def test_autocompile(model: Macaw, recorder: Recorder) -> None:
    pipeline = chain(model)
    expected = str(pipeline.run(x="a macaw"))
    recorder.clear()
    autocompile()
    try:
        assert str(pipeline.run(x="a macaw")) == expected
    finally:
        autocompile(False)
    assert recorder.requests == {"program": 1}
    pipeline.run(x="a macaw")
    assert recorder.requests["program"] == 1


def test_the_original_stays(model: Macaw, recorder: Recorder) -> None:
    pipeline = chain(model)
    compiled = compile(pipeline)
    assert compile(compiled) is compiled
    assert isinstance(compiled, QueryPipeline)
    assert compiled.module_dict is pipeline.module_dict
    pipeline.run(x="a macaw")
    assert not recorder.requests["program"]
