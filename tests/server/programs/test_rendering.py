from __future__ import annotations

from typing import Any

import pytest

from macaw.errors import ContextLengthError, InvalidRequestError
from macaw.protocol import ChatCompletionRequest, CompletionRequest
from macaw_server.programs.rendering import check_length, render
from server.programs.builders import byte_level_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.first %}{{ raise_exception('Start with the user.') }}{% endif %}"
    "[{{ m.role }}{% if m.name %}={{ m.name }}{% endif %}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat(*messages: tuple[str, Any], **fields: Any) -> ChatCompletionRequest:
    wire = [{"role": role, "content": content} for role, content in messages]
    return ChatCompletionRequest.model_validate({"messages": wire, **fields})


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def variable(name: str) -> dict[str, str]:
    return {"type": "variable", "variable": name}


def test_a_chat_is_the_template_s_text_tokenised_as_a_whole(tokenizer: Any) -> None:
    request = chat(("system", "Be brief."), ("user", [text("the mac"), variable("x"), text("!")]))
    rendered = render(request, {"x": "aw is"}, tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the macaw is!"}]
    assert rendered.text == "<s>[system]Be brief.[user]the macaw is![assistant]"
    assert rendered.token_ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    # as a whole: "mac" + "aw" of two parts is the one token that it is in running text
    assert tokenizer.convert_tokens_to_ids("Ġmacaw") in rendered.token_ids
    assert rendered.token_ids.count(tokenizer.bos_token_id) == 1


def test_a_text_completion_gets_the_tokenizer_s_special_tokens(tokenizer: Any) -> None:
    request = CompletionRequest.model_validate({"prompt": [text("the mac"), variable("x")]})
    rendered = render(request, {"x": "aw"}, tokenizer)
    assert rendered == ("the macaw", tokenizer.encode("the macaw"))
    assert render(CompletionRequest(prompt="the macaw"), {}, tokenizer) == rendered

    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert render(request, {"x": "aw"}, tokenizer).token_ids == [0, *rendered.token_ids]
    # the chat template writes its own
    assert render(chat(("user", "hi")), {}, tokenizer).token_ids.count(0) == 1


def test_token_ids_stay_as_they_are(tokenizer: Any) -> None:
    assert render(CompletionRequest(prompt=[5, 0, 7]), {}, tokenizer) == (None, [5, 0, 7])


def test_developer_is_the_template_s_system(tokenizer: Any) -> None:
    assert render(chat(("developer", "Be brief.")), {}, tokenizer).text == "<s>[system]Be brief.[assistant]"


def test_names_reach_the_template(tokenizer: Any) -> None:
    request = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "name": "Ann", "content": "hi"}]})
    assert render(request, {}, tokenizer).text == "<s>[user=Ann]hi[assistant]"


def test_special_tokens_in_text_are_what_transformers_makes_of_them(tokenizer: Any) -> None:
    rendered = render(CompletionRequest(prompt="a</s>b"), {}, tokenizer)
    assert tokenizer.eos_token_id in rendered.token_ids


def test_a_model_without_a_chat_template_takes_no_messages(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(InvalidRequestError) as caught:
        render(chat(("user", "hi")), {}, tokenizer)
    assert caught.value.param == "messages"
    assert "no chat template" in caught.value.message
    assert "/v1/completions" in caught.value.message


def test_what_the_template_refuses(tokenizer: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render(chat(("assistant", "hi"), ("user", "hi")), {}, tokenizer)
    assert (caught.value.code, caught.value.param) == ("invalid_request", "messages")
    assert caught.value.message.startswith(
        "The model's chat template refuses the messages (roles: assistant, user): Start with the user."
    )


def test_an_empty_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render(CompletionRequest(prompt=""), {}, tokenizer)
    assert caught.value.param == "prompt"
    assert caught.value.message.startswith("The prompt is empty")


def test_half_a_surrogate_pair_is_no_text(tokenizer: Any) -> None:
    request = CompletionRequest.model_validate({"prompt": [text("ab"), variable("x")]})
    with pytest.raises(InvalidRequestError) as caught:
        render(request, {"x": "\ud800"}, tokenizer)
    assert r"('\ud800') at character 2" in caught.value.message


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "allowed"), [(10, 6, 6), (10, None, 6), (15, None, 1), (15, 1, 1), (1, 3, 3)]
)
def test_the_answer_s_limit(num_prompt: int, max_tokens: int | None, allowed: int) -> None:
    assert check_length(num_prompt, max_tokens, 16) == allowed


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "message"),
    [
        (
            9120,
            256,
            "Prompt of 9,120 tokens plus max_tokens 256 is over the model's context of 8,192. Shorten the "
            "prompt, lower max_tokens, or serve with --max-model-len.",
        ),
        (
            8192,
            None,
            "Prompt of 8,192 tokens leaves no room for an answer in the model's context of 8,192. Shorten "
            "the prompt, or serve with --max-model-len.",
        ),
    ],
)
def test_over_the_context(num_prompt: int, max_tokens: int | None, message: str) -> None:
    with pytest.raises(ContextLengthError) as caught:
        check_length(num_prompt, max_tokens, 8192)
    assert caught.value.message == message
    assert caught.value.code == "context_length_exceeded"
