"""Constrained decoding on a real server, as clients and frameworks ask for it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from conftest import TENANTS
from langchain_macaw import ChatMacaw
from macaw import MacawClient
from macaw.errors import InvalidProgramError
from macaw.protocol import ProgramRequest
from macaw_server.serve import LocalServer

MODEL = "macaw-demo"
USER = [{"role": "user", "content": "Name a parrot."}]


class Parrot(BaseModel):
    """A bird."""

    name: str = Field(max_length=5)
    age: int = Field(ge=0, le=99)


SCHEMA = Parrot.model_json_schema()
FORMAT = {"type": "json_schema", "json_schema": {"name": "parrot", "schema": SCHEMA}}


@pytest.fixture
def api(local_server: LocalServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{local_server.url}/v1", api_key=TENANTS[0], max_retries=0) as api:
        yield api


def test_choices_of_one_request_are_valid_streamed_and_not(api: OpenAI) -> None:
    fields = {"model": MODEL, "messages": USER, "response_format": FORMAT, "temperature": 2, "n": 2, "seed": 5}
    answer = api.chat.completions.create(**fields)
    streamed = [""] * 2
    for chunk in api.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        Parrot.model_validate_json(choice.message.content)
        assert streamed[choice.index] == choice.message.content


def test_openais_parse(api: OpenAI) -> None:
    parsed = api.chat.completions.parse(model=MODEL, messages=USER, response_format=Parrot, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, Parrot)


def test_text_completions_take_regex_and_choice(api: OpenAI) -> None:
    for constraint, pattern in [
        ({"regex": "[0-9]{3}-[a-z]{1,8}!"}, "[0-9]{3}-[a-z]{1,8}!"),
        ({"choice": ["yes", "no"]}, "yes|no"),
    ]:
        answer = api.completions.create(
            model=MODEL, prompt="Once", temperature=2, extra_body={"structured_outputs": constraint}
        )
        assert re.fullmatch(pattern, answer.choices[0].text)


def program(second: dict[str, object]) -> ProgramRequest:
    first = {"messages": USER, "response_format": FORMAT, "temperature": 2}
    parts = [{"type": "text", "text": "Is it old? "}, {"type": "variable", "variable": "parrot"}]
    body = {
        "calls": [
            {"id": "a", "output": "parrot", "request": first},
            {"id": "b", "output": "old", "request": {"messages": [{"role": "user", "content": parts}], **second}},
        ],
        "targets": [{"variable": "parrot"}, {"variable": "old"}],
    }
    return ProgramRequest.model_validate(body)


def test_calls_of_a_program_are_constrained(client: MacawClient) -> None:
    variables = client.run_program(program({"structured_outputs": {"choice": ["yes", "no"]}})).variables
    Parrot.model_validate_json(variables["parrot"])
    assert variables["old"] in ("yes", "no")
    with pytest.raises(InvalidProgramError, match=r"calls\[1\].*|unclosed group") as error:
        client.run_program(program({"structured_outputs": {"regex": "(a"}}))
    assert error.value.param == "calls[1].request.structured_outputs.regex"


def test_langchains_structured_output(local_server: LocalServer) -> None:
    llm = ChatMacaw(model=MODEL, base_url=f"{local_server.url}/v1", api_key=TENANTS[0], seed=2)
    Parrot.model_validate(llm.with_structured_output(SCHEMA, method="json_schema").invoke("Name a parrot."))
    assert isinstance(llm.with_structured_output(Parrot, method="json_schema").invoke("Name a parrot."), Parrot)
    assert local_server.service is not None
    (brace,) = local_server.service.models.find(None).tokenizer.encode("}", add_special_tokens=False)
    llm.logit_bias = {brace: 100}
    assert llm.with_structured_output(method="json_mode").invoke("Name a parrot.") == {}
