"""The real `openai` client against a real socket."""

import openai
import pytest

from server.service.harness import MODEL, chat_prompt, encode, tokenizer, until

PROMPT = [{"role": "user", "content": "Count."}]


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, messages=PROMPT, **kwargs):
    return client.chat.completions.create(model=MODEL, messages=messages, **kwargs)


def expected(live, i=-1):
    """The text that the engine's i-th request was answered."""
    return tokenizer().decode(live.engine.answer(live.engine.requests[i]), skip_special_tokens=True)


def test_chat_completion(client):
    completion = chat(client)
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "one two three four",
        "stop",
    )
    assert (completion.object, completion.model) == ("chat.completion", MODEL)
    assert completion.id.startswith("chatcmpl-")
    num_prompt, num_answer = len(encode(chat_prompt("Count."))), len(encode("one two three four")) + 1
    assert completion.usage.prompt_tokens == num_prompt
    assert completion.usage.completion_tokens == num_answer
    assert completion.usage.total_tokens == num_prompt + num_answer
    assert completion.usage.prompt_tokens_details.cached_tokens == num_prompt // 2


def test_stream_joins_to_the_completion(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_stream_with_usage(client):
    *chunks, last = chat(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == chat(client).usage
    assert all(c.usage is None for c in chunks)


def test_characters_of_several_tokens_are_never_cut(client):
    messages = [{"role": "user", "content": "unicode"}]
    chunks = list(chat(client, messages, stream=True))
    pieces = [c.choices[0].delta.content or "" for c in chunks]
    assert "".join(pieces) == "na\u00efve \U0001f99c caf\u00e9"
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_the_engine(client, live, stream):
    answer = chat(client, stop=["hree f", "zzz"], stream=stream)
    if stream:
        chunks = list(answer)
        text, reason = (
            "".join(c.choices[0].delta.content or "" for c in chunks),
            chunks[-1].choices[0].finish_reason,
        )
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        num_used = len(live.engine.requests[-1].output_ids)
        assert answer.usage.completion_tokens == num_used
    assert (text, reason) == ("one two t", "stop")
    assert live.engine.aborted == [live.engine.requests[-1].request_id]


def test_max_tokens(client):
    for name in ("max_tokens", "max_completion_tokens"):
        completion = chat(client, **{name: 2})
        assert completion.choices[0].finish_reason == "length"
        assert completion.usage.completion_tokens == 2


def test_choices_have_consecutive_seeds(client, live):
    messages = [{"role": "user", "content": "anything"}]
    three = chat(client, messages, n=3, seed=11, max_tokens=8)
    assert [c.index for c in three.choices] == [0, 1, 2]
    assert [r.sampling.seed for r in live.engine.requests] == [11, 12, 13]
    texts = [c.message.content for c in three.choices]
    assert len(set(texts)) == 3
    again = chat(client, messages, seed=12, max_tokens=8)
    assert again.choices[0].message.content == texts[1]
    streamed = ["", "", ""]
    for chunk in chat(client, messages, n=3, seed=11, max_tokens=8, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert three.usage.completion_tokens == 24


def test_without_a_seed_answers_differ(client):
    messages = [{"role": "user", "content": "anything"}]
    first, second = (chat(client, messages, max_tokens=8).choices[0].message.content for _ in range(2))
    assert first != second


def test_sampling_parameters_arrive(client, live):
    fields = {"temperature": 0.0, "top_p": 0.5, "presence_penalty": 1.5, "frequency_penalty": -1, "seed": -1}
    extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [9]}
    chat(client, **fields, logit_bias={"17": -100}, extra_body=extra)
    sampling = live.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 0.5, 7, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (
        1.5,
        -1,
        1.2,
    )
    assert (sampling.seed, sampling.min_tokens, sampling.logit_bias) == (2**64 - 1, 2, {17: -100.0})
    assert sampling.stop_token_ids == {1, 9}
    chat(client, max_tokens=3, extra_body={"ignore_eos": True})
    assert live.engine.requests[1].sampling.stop_token_ids == frozenset()
    assert live.engine.requests[1].sampling.temperature == 1.0


def test_chat_logprobs(client):
    (choice,) = chat(client, logprobs=True, top_logprobs=2).choices
    content = choice.logprobs.content
    assert "".join(t.token for t in content) == choice.message.content
    assert b"".join(bytes(t.bytes) for t in content).decode() == choice.message.content
    assert all(t.logprob == -0.5 and len(t.top_logprobs) == 2 for t in content)
    chunks = chat(client, logprobs=True, top_logprobs=2, stream=True)
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == content


def test_completion_logprobs(client):
    (choice,) = client.completions.create(model=MODEL, prompt="Count.", logprobs=1).choices
    assert choice.text == "".join(choice.logprobs.tokens) == "one two three four"
    for token, offset, top in zip(
        choice.logprobs.tokens, choice.logprobs.text_offset, choice.logprobs.top_logprobs, strict=True
    ):
        assert choice.text[offset:].startswith(token)
        assert top == {token: -0.5}
    chunks = client.completions.create(model=MODEL, prompt="Count.", logprobs=1, stream=True)
    offsets = [o for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset]
    assert offsets == choice.logprobs.text_offset


def test_completion_of_several_prompts(client, live):
    prompts = ["Count.", "anything"]
    kwargs = {"model": MODEL, "prompt": prompts, "n": 2, "seed": 3, "max_tokens": 16}
    completion = client.completions.create(**kwargs)
    assert [c.index for c in completion.choices] == [0, 1, 2, 3]
    assert completion.choices[0].text == completion.choices[1].text == "one two three four"
    assert live.engine.prompts() == ["Count.", "Count.", "anything", "anything"]
    assert completion.usage.prompt_tokens == sum(len(encode(p)) for p in prompts)
    assert completion.object == "text_completion"
    streamed = [""] * 4
    last = None
    for last in client.completions.create(**kwargs, stream=True, stream_options={"include_usage": True}):
        for choice in last.choices:
            streamed[choice.index] += choice.text
    assert streamed == [c.text for c in completion.choices]
    assert last.usage == completion.usage


@pytest.mark.parametrize("wrap", [lambda ids: ids, lambda ids: [ids]])
def test_completion_of_token_ids(client, wrap):
    completion = client.completions.create(model=MODEL, prompt=wrap(encode("Count.")))
    assert completion.choices[0].text == "one two three four"


def test_models(client):
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "macaw")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError, match="Served: 'tiny/scripted'"):
        client.models.retrieve("gpt-9")


def test_errors_are_the_clients_exceptions(client):
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, functions=[{"name": "f", "parameters": {}}])
    assert (e.value.code, e.value.param) == ("unsupported_parameter", "functions")
    with pytest.raises(openai.NotFoundError) as e:
        client.chat.completions.create(model="gpt-9", messages=PROMPT)
    assert e.value.code == "unknown_model"


def test_a_failure_within_a_stream(client, live):
    live.engine.hold()
    stream = chat(client, stream=True)

    async def fail():
        live.engine.step()
        live.engine.fail("engine_failed", "the engine died")

    live.run(until(lambda: live.engine.active))
    live.run(fail())
    with pytest.raises(openai.APIError, match="the engine died") as e:
        list(stream)
    assert e.value.code == "engine_failed"


def test_expected_text_is_what_the_engine_said(client, live):
    completion = chat(client, [{"role": "user", "content": "anything"}], max_tokens=30)
    assert completion.choices[0].message.content == expected(live)
