"""The `openai` client against a real server: every feature of the endpoints with a real engine behind."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from conftest import TENANTS
from macaw_server.serve import LocalServer

MODEL = "macaw-demo"


@pytest.fixture
def api(local_server: LocalServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{local_server.url}/v1", api_key=TENANTS[0], max_retries=0) as api:
        yield api


def chat(api: OpenAI, text: str, **params: object) -> openai.types.chat.ChatCompletion:
    return api.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **params)


def test_models(api: OpenAI) -> None:
    assert [model.id for model in api.models.list()] == [MODEL]
    assert api.models.retrieve(MODEL).id == MODEL


def test_chat_streamed_and_not_are_the_same(api: OpenAI) -> None:
    whole = chat(api, "What is a page?", max_tokens=20, temperature=0)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 20
    chunks = list(
        chat(
            api,
            "What is a page?",
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == 20


def test_cached_tokens_are_reported(api: OpenAI) -> None:
    prompt = "a prompt that is asked twice " * 20
    first, second = (chat(api, prompt, max_tokens=4, temperature=0) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached == (second.usage.prompt_tokens - 1) // 16 * 16
    assert second.choices[0].message.content == first.choices[0].message.content


def test_a_seed_repeats_and_another_differs(api: OpenAI) -> None:
    texts = [chat(api, "seeds", max_tokens=24, temperature=1.0, seed=s).choices[0].message.content for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_n_choices_are_independent_and_share_the_prompt(api: OpenAI) -> None:
    answer = chat(api, "several answers, please", max_tokens=16, temperature=1.0, seed=7, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 48
    alone = chat(api, "several answers, please", max_tokens=16, temperature=1.0, seed=8)
    assert alone.choices[0].message.content == answer.choices[1].message.content, "choice i has seed + i"


def test_a_stop_string_cuts_the_answer_before_it(api: OpenAI) -> None:
    whole = chat(api, "Where to stop?", max_tokens=30, temperature=0).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    cut = chat(api, "Where to stop?", max_tokens=30, temperature=0, stop=[stop, "never to be seen"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 30
    parts = chat(api, "Where to stop?", max_tokens=30, temperature=0, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in parts) == cut.choices[0].message.content


def test_stop_token_ids_and_the_least_length(api: OpenAI) -> None:
    plain = chat(api, "ids", max_tokens=12, temperature=0, logprobs=True)
    biased = chat(api, "ids", max_tokens=12, temperature=0, logit_bias={"77": 100})
    assert biased.choices[0].message.content != plain.choices[0].message.content
    stopped = chat(
        api, "ids", max_tokens=12, temperature=0, logit_bias={"77": 100}, extra_body={"stop_token_ids": [77]}
    )
    assert (stopped.choices[0].finish_reason, stopped.usage.completion_tokens) == ("stop", 1)
    late = chat(
        api,
        "ids",
        max_tokens=12,
        temperature=0,
        logit_bias={"77": 100},
        extra_body={"stop_token_ids": [77], "min_tokens": 5},
    )
    assert late.usage.completion_tokens == 6


def test_logprobs(api: OpenAI) -> None:
    answer = chat(api, "How likely?", max_tokens=6, temperature=0, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the most likely"
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
    assert b"".join(bytes(e.bytes) for e in content).decode(errors="replace") == answer.choices[0].message.content


def test_text_completions(api: OpenAI) -> None:
    answer = api.completions.create(model=MODEL, prompt="Once upon", max_tokens=8, temperature=0, logprobs=2)
    assert len(answer.choices[0].logprobs.tokens) == 8
    both = api.completions.create(model=MODEL, prompt=["Once upon", "A page"], max_tokens=8, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == answer.choices[0].text
    ids = api.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=3, temperature=0)
    assert ids.usage.prompt_tokens == 3
    parts = api.completions.create(model=MODEL, prompt="Once upon", max_tokens=8, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == answer.choices[0].text


def test_penalties_keep_the_model_from_repeating_itself(api: OpenAI) -> None:
    def repeats(**params: object) -> int:
        """How often a favoured token comes up among 20."""
        answer = chat(api, "again", max_tokens=20, temperature=0, logprobs=True, logit_bias={"77": 12}, **params)
        tokens = [entry.token for entry in answer.choices[0].logprobs.content]
        return tokens.count(tokens[0])

    assert repeats() == 20
    assert repeats(frequency_penalty=2.0) < 20
    assert repeats(presence_penalty=2.0, extra_body={"repetition_penalty": 10.0}) < 20


def test_errors_are_those_of_openai(api: OpenAI, local_server: LocalServer) -> None:
    with pytest.raises(openai.BadRequestError, match=r"3,013 tokens .* context of 2,048") as error:
        chat(api, "long " * 3000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="functions") as error:
        chat(api, "x", functions=[{"name": "f"}])
    assert error.value.code == "unsupported_parameter"
    with pytest.raises(openai.NotFoundError, match="macaw-demo") as error:
        api.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    assert error.value.code == "unknown_model"
    stranger = OpenAI(base_url=f"{local_server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_tenants_share_no_cache(local_server: LocalServer) -> None:
    cached = []
    for tenant in (TENANTS[0], TENANTS[1], TENANTS[1]):
        with OpenAI(base_url=f"{local_server.url}/v1", api_key=tenant) as api:
            cached.append(chat(api, "the same words " * 30, max_tokens=2).usage.prompt_tokens_details.cached_tokens)
    assert cached[:2] == [0, 0]
    assert cached[2] > 0
