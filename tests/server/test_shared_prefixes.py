"""Files of public text: which tokens of a prompt they stand for."""

import pytest

from macaw.protocol import ChatCompletionRequest, CompletionRequest
from macaw_server.errors import ConfigError
from macaw_server.programs.rendering import render
from macaw_server.shared_prefixes import read_shared_prefixes
from server.service.harness import tokenizer

TEXT = "You are a parrot. Repeat what you hear, and add a remark. " * 4


@pytest.fixture
def forms(tmp_path):
    path = tmp_path / "system.txt"
    path.write_text(TEXT + "\n")
    return {prefix.form: prefix for prefix in read_shared_prefixes([path], tokenizer())}


def starts_with(request, prefix):
    return render(request, {}, tokenizer()).token_ids[: len(prefix.token_ids)] == prefix.token_ids


@pytest.mark.parametrize("question", ["Hello!", "", " \n", "0", "\u00e9"])
def test_prompts_with_the_text_start_with_its_tokens(forms, question):
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": question}]
    chat = ChatCompletionRequest.model_validate({"messages": messages})
    assert starts_with(chat, forms["system message"])
    assert tokenizer().decode(forms["system message"].token_ids) == f"<|role|>system\n{TEXT}</s><|role|>user\n"


def test_a_prompt_shares_what_does_not_depend_on_what_follows(forms):
    for question in ("Hello!", "\n", "1"):
        assert starts_with(CompletionRequest.model_validate({"prompt": TEXT + question}), forms["prompt"])
    shared = tokenizer().decode(forms["prompt"].token_ids)
    assert TEXT.startswith(shared)
    assert len(TEXT) - len(shared) < 8


def test_what_is_shared_is_said_in_pages(forms):
    num_tokens = len(forms["prompt"].token_ids)
    assert f"as prompt: {num_tokens // 16 * 16} of {num_tokens} tokens shared, {num_tokens // 16} pages" in forms[
        "prompt"
    ].describe(16)
    assert "not shared, it does not fill a page" in forms["prompt"].describe(256)


def test_a_model_without_conversations_has_one_form(tmp_path, monkeypatch):
    (tmp_path / "a").write_text(TEXT)
    monkeypatch.setattr(tokenizer(), "chat_template", None)
    assert [prefix.form for prefix in read_shared_prefixes([tmp_path / "a"], tokenizer())] == ["prompt"]


@pytest.mark.parametrize(("content", "words"), [(b"\xff", "cannot be read as UTF-8"), (b" \n", "is empty")])
def test_files_that_are_no_text(tmp_path, content, words):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_shared_prefixes([tmp_path / "a", tmp_path / "b"], tokenizer())
