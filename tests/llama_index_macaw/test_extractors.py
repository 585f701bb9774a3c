"""Extractors compiled against plain: the same metadata and everything else, and one program for all nodes."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import openai
import pytest
from llama_index.core.extractors import (
    BaseExtractor,
    DocumentContextExtractor,
    KeywordExtractor,
    QuestionsAnsweredExtractor,
    SummaryExtractor,
    TitleExtractor,
)
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.schema import BaseNode, Document, ImageNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore

from llama_index.llms.macaw import Macaw, autocompile, compile, fanout
from llama_index.llms.macaw.compile import HAS_PIPELINES
from llama_index_macaw.observing import Bench, Observed, run_async
from macaw.errors import ContextLengthError
from scripted_macaw_server import Recorder

DOCUMENTS = [Document(text=f"All of document {name}. " * 9, id_=name) for name in ("one", "two", "three")]
KINDS: dict[str, tuple[Callable[[Macaw], BaseExtractor], int]] = {
    "keywords": (lambda llm: KeywordExtractor(llm=llm, keywords=3, show_progress=False), 7),
    "questions": (lambda llm: QuestionsAnsweredExtractor(llm=llm, questions=2, show_progress=False), 7),
    "summaries": (lambda llm: SummaryExtractor(llm=llm, summaries=["prev", "self"], show_progress=False), 7),
    "titles": (lambda llm: TitleExtractor(llm=llm, nodes=2, show_progress=False), 5 + 3),
    "contexts": (lambda llm: _contexts(llm), 6),
}
if HAS_PIPELINES:  # with llama-index-core 0.12 the extractor asks chats for what only Anthropic's server takes
    del KINDS["contexts"]
needs_contexts = pytest.mark.skipif(HAS_PIPELINES, reason="DocumentContextExtractor sends cache_control in a message")


def _contexts(llm: Macaw) -> DocumentContextExtractor:
    store = SimpleDocumentStore()
    store.add_documents(DOCUMENTS)
    return DocumentContextExtractor(docstore=store, llm=llm, max_output_tokens=20, show_progress=False)


def nodes() -> list[BaseNode]:
    """Of three documents, which they are not in the order of; two are the same, and one has its context."""
    found: list[BaseNode] = []
    for i, document in enumerate([0, 1, 0, 2, 1, 0, 0]):
        source = RelatedNodeInfo(node_id=DOCUMENTS[document].node_id)
        text = f"The macaw number {min(i, 5)} flies and eats nuts. " * 3
        found.append(TextNode(id_=f"node-{i}", text=text, relationships={NodeRelationship.SOURCE: source}))
    found[3].metadata["context"] = "It has one."
    return found


@pytest.fixture
def bench(recorder: Recorder) -> Bench:
    return Bench(recorder)


@pytest.fixture
def model(server_url: str, bench: Bench) -> Macaw:
    options = {"is_function_calling_model": False, "max_tokens": 64, "max_retries": 0, "context_window": 2000}
    return Macaw(model="m", api_base=server_url, is_chat_model=True, callback_manager=bench.callback_manager, **options)


def observe(bench: Bench, extractor: BaseExtractor, *, asynchronous: bool, **kwargs: Any) -> Observed:
    """What a run over `nodes` gives, in any order: the workers overtake each other."""

    def run() -> str:
        if asynchronous:
            return str([node.to_dict() for node in run_async(extractor.aprocess_nodes(nodes()))])
        return str([node.to_dict() for node in extractor.process_nodes(nodes())])

    return bench.observe(run, **kwargs).in_any_order()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_program_and_everything_else_as_before(
    kind: str, chat: bool, asynchronous: bool, model: Macaw, bench: Bench, recorder: Recorder
) -> None:
    build, num_calls = KINDS[kind]
    extractor = build(model.model_copy(update={"is_chat_model": chat}))
    expected = observe(bench, extractor, asynchronous=asynchronous)
    assert recorder.requests == {"chat" if chat else "completion": num_calls}
    actual = observe(bench, compile(extractor), asynchronous=asynchronous)
    assert actual == expected
    assert expected.error is None
    assert recorder.requests == {"program": 1}


def test_all_nodes_at_once(model: Macaw, recorder: Recorder) -> None:
    """Not only as many as there are workers; and the candidates of all titles, which are asked for one by one."""
    for build, peak in [(KINDS["keywords"][0], 7), (KINDS["titles"][0], 5)]:
        recorder.clear()
        compile(build(model)).process_nodes(nodes())
        assert (recorder.requests, recorder.peak) == ({"program": 1}, peak)


@pytest.mark.parametrize("answer", ["", " \n nuts \n "])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_out_of_the_ordinary(kind: str, answer: str, model: Macaw, bench: Bench, recorder: Recorder) -> None:
    extractor = KINDS[kind][0](model)

    def script(prompt: str) -> str | None:
        return answer if "number 2" in prompt else None

    expected = observe(bench, extractor, asynchronous=False, script=script)
    assert observe(bench, compile(extractor), asynchronous=False, script=script) == expected
    assert recorder.requests == {"program": 1}


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # LlamaIndex's other workers
@pytest.mark.parametrize("kind", KINDS)
def test_an_error(kind: str, model: Macaw, bench: Bench, recorder: Recorder) -> None:
    """It is raised where it would be; the extractor of contexts goes on without."""
    extractor = KINDS[kind][0](model)

    def fail(prompt: str) -> str | None:
        if "number 2" in prompt:
            raise ContextLengthError("Context of 12 tokens is over the model's 10. Shorten the prompt.")
        return None

    expected = observe(bench, extractor, asynchronous=True, script=fail)
    actual = observe(bench, compile(extractor), asynchronous=True, script=fail)
    assert (actual.result, actual.error) == (expected.result, expected.error)
    assert recorder.requests["program"] == 1  # other workers may go on for a while
    if kind != "contexts":
        assert issubclass(expected.error[0], openai.BadRequestError)
    gc.collect()  # what was never awaited is told here, not in another test


def test_many_nodes_are_several_programs(
    model: Macaw, bench: Bench, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document's title is in the program of its candidates."""
    monkeypatch.setattr(fanout, "MAX_CALLS", 3)
    for build, programs in [(KINDS["keywords"][0], 3), (KINDS["titles"][0], 3)]:
        expected = observe(bench, build(model), asynchronous=False)
        assert observe(bench, compile(build(model)), asynchronous=False) == expected
        assert recorder.requests == {"program": programs}


def test_a_server_without_programs(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    extractor = KINDS["keywords"][0](model)
    expected = observe(bench, extractor, asynchronous=False).result
    recorder.clear()
    recorder.down = True
    compiled = compile(extractor)
    assert str([node.to_dict() for node in compiled.process_nodes(nodes())]) == expected
    assert recorder.requests == {"program": 1, "chat": 7}


@needs_contexts
def test_what_is_no_text(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    def run(extractor: BaseExtractor) -> Observed:
        mixed = [*nodes()[:2], ImageNode(id_="image", image_url="nowhere"), Document(text="text", id_="document")]
        return bench.observe(lambda: str(extractor.extract(mixed))).in_any_order()

    for kind, programs in {"keywords": 1, "summaries": 0, "contexts": 1}.items():
        extractor = KINDS[kind][0](model)
        expected = run(extractor)
        assert (expected.error is None) == bool(programs)
        assert run(compile(extractor)) == expected
        assert recorder.requests["program"] == programs


@needs_contexts
def test_a_document_that_is_missing_or_too_long(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    extractor = _contexts(model)
    extractor.docstore.delete_document("two")
    expected = observe(bench, extractor, asynchronous=True)
    assert observe(bench, compile(extractor), asynchronous=True) == expected
    assert recorder.requests == {"program": 1}
    extractor.max_context_length, extractor.oversized_document_strategy = 10, "error"
    expected = observe(bench, extractor, asynchronous=True)
    assert expected.error[0] is ValueError
    assert observe(bench, compile(extractor), asynchronous=True) == expected
    assert not recorder.requests


def test_nothing_to_do(model: Macaw, recorder: Recorder) -> None:
    for build, _ in KINDS.values():
        assert compile(build(model)).process_nodes([]) == []
    assert not recorder.requests


def test_in_an_ingestion_pipeline(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    """A program for each extractor, as each reads what the one before it has found."""

    def run(compiled: bool) -> Observed:
        steps = [
            TokenTextSplitter(chunk_size=40, chunk_overlap=0),
            KINDS["titles"][0](model),
            KINDS["keywords"][0](model),
        ]
        pipeline = IngestionPipeline(transformations=steps, disable_cache=True)
        chosen = compile(pipeline) if compiled else pipeline
        assert pipeline.transformations == steps
        return bench.observe(lambda: str([node.metadata for node in chosen.run(documents=DOCUMENTS)])).in_any_order()

    expected = run(compiled=False)
    assert run(compiled=True) == expected
    assert recorder.requests == {"program": 2}


def test_it_is_the_same_to_a_cache(model: Macaw) -> None:
    for build, _ in KINDS.values():
        extractor = build(model)
        compiled = compile(extractor)
        assert compiled.to_dict() == extractor.to_dict()
        assert get_transformation_hash(nodes(), compiled) == get_transformation_hash(nodes(), extractor)


@pytest.mark.parametrize("kind", ["keywords", "titles"])
def test_copies(kind: str, model: Macaw, recorder: Recorder) -> None:
    extractor = KINDS[kind][0](model.model_copy(update={"callback_manager": None}))
    compiled = compile(extractor)
    assert isinstance(compiled, type(extractor))
    assert compile(compiled) is compiled
    expected = str(extractor.extract(nodes()))
    assert not recorder.requests["program"]
    for again in (copy.copy(compiled), copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        recorder.clear()
        assert str(again.extract(nodes())) == expected
        assert recorder.requests == {"program": 1}


def test_autocompile(model: Macaw, bench: Bench, recorder: Recorder) -> None:
    extractor = KINDS["titles"][0](model)
    expected = observe(bench, extractor, asynchronous=False)
    autocompile()
    try:
        assert observe(bench, extractor, asynchronous=False) == expected
        assert recorder.requests == {"program": 1}
        assert observe(bench, compile(extractor), asynchronous=False) == expected
        assert recorder.requests == {"program": 1}
    finally:
        autocompile(False)
    observe(bench, extractor, asynchronous=False)
    assert not recorder.requests["program"]
