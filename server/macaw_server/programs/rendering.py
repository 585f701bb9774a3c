"""Rendering: from a request and the values of its variables to text, and from text to tokens.

The text is what the application itself would have rendered, and it is tokenised as a whole (architecture.md,
rule 1): joining the tokens of parts would be faster, and another prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from macaw.errors import ContextLengthError, InvalidRequestError
from macaw.protocol import ChatCompletionRequest, CompletionRequest
from macaw_server.programs.messages import joined, template_messages, tool_list
from macaw_server.tool_calls import RENDER_ERRORS, TemplateTools, inspect_template, without_tools


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that Macaw uses."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """A token as the vocabulary spells it."""
        ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
    ) -> Any:
        """The text of a conversation, up to where the assistant's answer starts."""
        ...


class Rendered(NamedTuple):
    """A prompt. `text` is None where the client sent token ids."""

    text: str | None
    token_ids: list[int]


def render(
    request: ChatCompletionRequest | CompletionRequest, values: Mapping[str, str], tokenizer: Tokenizer
) -> Rendered:
    """Render and tokenise a prompt.

    A chat goes through the model's chat template, which writes the special tokens (BOS too) itself, and the tools;
    where it knows none, a system message tells of them (`tool_calls.templates`). A text completion gets the special
    tokens that the tokenizer adds; token ids stay as they are. The role `developer` becomes `system`, the name under
    which chat templates know it. Text that spells a special token (``<|im_start|>``) becomes that token, wherever it
    comes from: so does transformers, and the prompt is to be the same.

    Args:
        request: A completion request must have one prompt.
        values: Of all variables in the prompt.
        tokenizer: The model's.

    Raises:
        InvalidRequestError: The model has no chat template, the template refuses the messages, the text is
            not valid Unicode, or the prompt has no tokens.
    """
    if isinstance(request, CompletionRequest) and (token_ids := _token_ids(request)) is not None:
        return Rendered(None, token_ids)
    text = prompt_text(request, values, tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InvalidRequestError(
            f"The prompt holds half a surrogate pair ({text[e.start]!r}) at character {e.start:,}, which is "
            "no text. Send valid Unicode."
        ) from e
    chat = isinstance(request, ChatCompletionRequest)
    token_ids = tokenizer.encode(text, add_special_tokens=not chat)
    if not token_ids:
        raise InvalidRequestError(
            "The prompt is empty: it has no tokens. A model needs at least one token to go on from.",
            param="messages" if chat else "prompt",
        )
    return Rendered(text, token_ids)


def prompt_text(
    request: ChatCompletionRequest | CompletionRequest, values: Mapping[str, str], tokenizer: Tokenizer
) -> str:
    """The text of a prompt that is not given as token ids; see `render`."""
    if isinstance(request, ChatCompletionRequest):
        return _apply_chat_template(request, values, tokenizer)
    return joined(request.parts, values)


def template_tools(tokenizer: Tokenizer) -> TemplateTools:
    """What the model's chat template makes of tools."""
    return inspect_template(tokenizer.apply_chat_template, str(tokenizer.chat_template))


def check_length(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> int:
    """The number of tokens that the answer may have: `max_tokens`, or what is left of the context.

    Raises:
        ContextLengthError: Prompt and answer do not fit.
    """
    if max_tokens is None and num_prompt_tokens < max_model_len:
        return max_model_len - num_prompt_tokens
    if max_tokens is None:
        raise ContextLengthError(
            f"Prompt of {num_prompt_tokens:,} tokens leaves no room for an answer in the model's context of "
            f"{max_model_len:,}. Shorten the prompt, or serve with --max-model-len."
        )
    if num_prompt_tokens + max_tokens > max_model_len:
        raise ContextLengthError(
            f"Prompt of {num_prompt_tokens:,} tokens plus max_tokens {max_tokens:,} is over the model's "
            f"context of {max_model_len:,}. Shorten the prompt, lower max_tokens, or serve with "
            "--max-model-len."
        )
    return max_tokens


def _token_ids(request: CompletionRequest) -> list[int] | None:
    prompt = request.prompt
    if isinstance(prompt, str):
        return None
    assert not isinstance(prompt[0], str | list), f"one prompt at a time, not {len(prompt)}"
    return [item for item in prompt if isinstance(item, int)] or None


def _apply_chat_template(request: ChatCompletionRequest, values: Mapping[str, str], tokenizer: Tokenizer) -> str:
    if not tokenizer.chat_template:
        raise InvalidRequestError(
            "This model has no chat template, so it takes no messages. Send the text as a prompt: to "
            "/v1/completions, or in a program as prompt instead of messages.",
            param="messages",
        )
    tools = tool_list(request)
    messages = template_messages(request.messages, values)
    if tools or any(message.tool_calls or message.tool_call_id for message in request.messages):
        known = template_tools(tokenizer)
        if not known.lists_tools:
            messages, tools = without_tools(messages, tools), []
        elif known.format is not None and known.format.id_len is not None:
            messages = template_messages(request.messages, values, known.format.id_len)
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **({"tools": tools} if tools else {})
        )
    except RENDER_ERRORS as e:
        roles = ", ".join(message["role"] for message in messages)
        raise InvalidRequestError(
            f"The model's chat template refuses the messages (roles: {roles}): {e}. Send messages in the "
            "order that the template wants.",
            param="messages",
        ) from e
    return text
