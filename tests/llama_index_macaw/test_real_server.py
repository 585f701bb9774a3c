"""`Macaw` on a real server with a tiny model: answers, structure, tools, hints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field

from conftest import TENANTS
from llama_index.llms.macaw import Macaw
from llama_index_macaw.ways import WAYS, text_of
from macaw import MacawClient
from macaw_server.serve import LocalServer

dispatcher = get_dispatcher(__name__)


@pytest.fixture
def real_llm(local_server: LocalServer) -> Macaw:
    return Macaw(api_base=local_server.url, api_key=TENANTS[0], temperature=0, max_tokens=8, max_retries=0)


@pytest.mark.parametrize("is_chat_model", [True, False])
@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_all_ways_give_the_same_answer(kind: str, is_chat_model: bool, real_llm: Macaw) -> None:
    llm = real_llm.model_copy(update={"is_chat_model": is_chat_model})
    last = {way: WAYS[way](llm)[-1] for way in WAYS if way.endswith(kind)}
    assert len(last) == 4
    assert len({text_of(response) for response in last.values()}) == 1
    for response in last.values():
        usage = response.raw.usage
        assert usage.completion_tokens <= 8
        assert usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens


def test_cached_tokens(real_llm: Macaw) -> None:
    prompt = "The same words again and again. " * 20
    real_llm.complete(prompt)
    counts = real_llm.complete(prompt).additional_kwargs
    assert counts["cached_tokens"] > counts["prompt_tokens"] // 2


def test_metadata(real_llm: Macaw) -> None:
    metadata = real_llm.metadata
    assert (metadata.model_name, metadata.context_window) == ("macaw-demo", 2048)
    assert metadata.is_chat_model
    assert metadata.is_function_calling_model


class Animal(BaseModel):
    kind: Literal["parrot", "cat"]
    legs: int = Field(ge=2, le=4)
    colours: list[Literal["red", "blue"]] = Field(max_length=2)


async def test_structure(real_llm: Macaw) -> None:
    """A model of random weights keeps to the schema: the server lets it write nothing else."""
    llm, prompt = real_llm.model_copy(update={"max_tokens": 300}), PromptTemplate("Describe a {what}.")
    for what in ("bird", "pet"):
        animal = llm.structured_predict(Animal, prompt, what=what)
        assert isinstance(animal, Animal)
        assert await llm.astructured_predict(Animal, prompt, what=what) == animal
        assert list(llm.stream_structured_predict(Animal, prompt, what=what))[-1] == animal
    structured = llm.as_structured_llm(Animal)
    assert isinstance(structured.complete("Describe a bird.").raw, Animal)
    assert isinstance((await structured.achat([ChatMessage("Describe a pet.")])).raw, Animal)


def test_structure_of_text_completions(real_llm: Macaw) -> None:
    llm = real_llm.model_copy(update={"max_tokens": 300, "is_chat_model": False})
    assert isinstance(llm.structured_predict(Animal, PromptTemplate("A bird:")), Animal)


def test_too_long(real_llm: Macaw) -> None:
    with pytest.raises(openai.BadRequestError, match=r"2,?048") as caught:
        real_llm.complete("word " * 3000)
    assert caught.value.code == "context_length_exceeded"


# -----------------------------------------------------------------------------------------------------------
# Tools


class Arguments(BaseModel):
    city: Literal["Lima", "Cusco"]
    days: Literal[1, 2]


def weather(city: str, days: int) -> str:
    """The weather of the next days."""
    return f"{days} sunny days in {city}"


TOOL = FunctionTool.from_defaults(weather, fn_schema=Arguments)


def test_forced_call(real_llm: Macaw) -> None:
    llm = real_llm.model_copy(update={"max_tokens": 200})
    response = llm.chat_with_tools([TOOL], user_msg="How is the weather in Lima?", tool_required=True)
    [call] = llm.get_tool_calls_from_response(response)
    assert call.tool_name == "weather"
    assert weather(**call.tool_kwargs)
    *_, last = llm.stream_chat_with_tools([TOOL], user_msg="How is the weather in Lima?", tool_required=True)
    [streamed] = llm.get_tool_calls_from_response(last)
    assert streamed.tool_kwargs == call.tool_kwargs
    assert last.raw.usage.completion_tokens > 0


async def test_forced_call_async(real_llm: Macaw) -> None:
    llm = real_llm.model_copy(update={"max_tokens": 200})
    response = await llm.achat_with_tools([TOOL], user_msg="How is the weather?", tool_choice="weather")
    [call] = llm.get_tool_calls_from_response(response)
    assert weather(**call.tool_kwargs)
    result = await llm.apredict_and_call([TOOL], user_msg="How is the weather?", tool_choice="weather")
    assert result.response == weather(**call.tool_kwargs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # workflows look at every attribute there is
async def test_function_agent(real_llm: Macaw) -> None:
    llm = real_llm.model_copy(update={"max_tokens": 60})
    agent = FunctionAgent(tools=[TOOL], llm=llm, initial_tool_choice="weather")
    handler = agent.run("How is the weather in Lima?")
    results = [event async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
    await handler
    assert results[0].tool_name == "weather"
    assert "sunny days in" in str(results[0].tool_output)


# -----------------------------------------------------------------------------------------------------------
# Hints


@dispatcher.span
def ask(llm: Macaw) -> Iterator[Any]:
    return llm.stream_complete("Tell me everything.", ignore_eos=True)


def test_the_server_shows_them(real_llm: Macaw, client: MacawClient) -> None:
    stream = ask(real_llm.model_copy(update={"max_tokens": 1000}))
    next(stream)
    running = [program.metadata.get("app", "") for program in client.list_programs() if program.status == "running"]
    del stream
    assert any(app.startswith("ask-") for app in running)
