"""`MacawLLM` on a real server."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import openai
import pytest

from conftest import TENANTS
from langchain_macaw import MacawLLM
from macaw_server.serve import LocalServer


@pytest.fixture
def llm(local_server: LocalServer) -> MacawLLM:
    return MacawLLM(
        model="macaw-demo", base_url=f"{local_server.url}/v1", api_key=TENANTS[0], temperature=0, max_tokens=8
    )


async def test_every_way_gives_the_same_text(llm: MacawLLM) -> None:
    text = llm.invoke("The macaw is")
    assert text
    assert await llm.ainvoke("The macaw is") == text
    assert "".join(llm.stream("The macaw is")) == text
    assert "".join([chunk async for chunk in llm.astream("The macaw is")]) == text
    streaming = llm.model_copy(update={"streaming": True})
    assert streaming.invoke("The macaw is") == await streaming.ainvoke("The macaw is") == text


async def test_several_prompts_are_one_request_with_its_usage(llm: MacawLLM) -> None:
    prompts = ["The macaw is", "A parrot", "Birds of the forest"]
    result, later = llm.generate(prompts), await llm.agenerate(prompts)
    assert [g[0].text for g in result.generations] == [llm.invoke(p) for p in prompts]
    assert [g[0].text for g in later.generations] == [g[0].text for g in result.generations]
    assert result.llm_output is not None
    usage = result.llm_output["token_usage"]
    assert usage["prompt_tokens"] == sum(map(llm.get_num_tokens, prompts))
    assert usage["completion_tokens"] <= 3 * 8
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0
    info = result.generations[0][0].generation_info
    assert info is not None
    assert info["program_id"].startswith("prog-")
    assert info["finish_reason"] in ("stop", "length")


async def test_streamed_usage(llm: MacawLLM) -> None:
    result = llm.model_copy(update={"streaming": True}).generate(["The macaw is"])
    assert result.llm_output is not None
    assert result.llm_output["token_usage"]["prompt_tokens"] == llm.get_num_tokens("The macaw is")


def test_choices_stop_and_extensions(llm: MacawLLM) -> None:
    result = llm.generate(["a", "b"], n=2, temperature=1.0, seed=5)
    assert [len(choices) for choices in result.generations] == [2, 2]
    text = llm.invoke("The macaw is", ignore_eos=True)
    assert llm.invoke("The macaw is", stop=[text[2]]) == text[: text.index(text[2])]
    assert llm.bind(structured_outputs={"choice": ["yes"]}).invoke("x") == "yes"


def test_only_what_is_given_is_sent() -> None:
    assert MacawLLM(model="m")._default_params == {"model": "m"}
    given = MacawLLM(model="m", top_k=3, stop=["x"], extra_body={"min_p": 0.1})._payload(None, {})
    assert given == {"model": "m", "stop": ["x"], "extra_body": {"top_k": 3, "min_p": 0.1}}
    with pytest.raises(ValueError, match="best_of"):
        MacawLLM(model="m", best_of=2)


def test_it_works_in_any_event_loop_and_is_pickled(llm: MacawLLM) -> None:
    texts = [asyncio.run(llm.ainvoke("The macaw is")) for _ in range(2)]
    assert texts[0] == texts[1]
    again: Any = pickle.loads(pickle.dumps(llm))
    assert again.invoke("The macaw is") == texts[0]


def test_tracing_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACAW_API_KEY", "mine")
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-server")
    llm = MacawLLM(model="m", max_tokens=3)
    assert llm.client._client.api_key == "mine"
    params = llm._get_ls_params(model="other")
    assert (params["ls_provider"], params["ls_model_name"], params["ls_model_type"]) == ("macaw", "other", "llm")
    assert llm._llm_type == "macaw-llm"


def test_errors_are_openais(llm: MacawLLM) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        llm.invoke("word " * 5000)
