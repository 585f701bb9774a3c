"""`--shared-prefix FILE`: text that the operator declares public, as the tokens with which prompts start."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from macaw.errors import InvalidRequestError
from macaw.protocol import ChatCompletionRequest, CompletionRequest
from macaw_server.errors import ConfigError
from macaw_server.programs.rendering import Tokenizer, render

_GO_ON = ("a", "\n\n1")
"""Two ways to go on: the tokens that prompts with both have in common do not depend on what follows."""


class SharedPrefix(NamedTuple):
    """One file in one form.

    Attributes:
        path: Of the file.
        form: ``system message`` of a conversation, or ``prompt`` of a text completion.
        token_ids: What all prompts that start so have in common.
    """

    path: Path
    form: str
    token_ids: list[int]

    def describe(self, page_size: int) -> str:
        """What of it is shared: full pages only."""
        num_pages = len(self.token_ids) // page_size
        shared = f"{num_pages * page_size:,} of {len(self.token_ids):,} tokens shared, {num_pages:,} pages"
        return f"{self.path} as {self.form}: {shared if num_pages else 'not shared, it does not fill a page'}"


def read_shared_prefixes(paths: Iterable[Path], tokenizer: Tokenizer) -> list[SharedPrefix]:
    """The tokens of each file, as a system message (where the model has such) and as the start of a prompt.

    The text is the file's, without one newline at its end, which editors add.

    Raises:
        ConfigError: A file cannot be read, or holds no text.
    """
    prefixes = []
    for path in paths:
        try:
            text = path.read_bytes().decode().removesuffix("\n")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"--shared-prefix {path} cannot be read as UTF-8: {e}.") from e
        if not text.strip():
            raise ConfigError(f"--shared-prefix {path} is empty. Give a file with the text that prompts start with.")
        prefixes += _forms(path, text, tokenizer)
    return prefixes


def _forms(path: Path, text: str, tokenizer: Tokenizer) -> list[SharedPrefix]:
    raw = [CompletionRequest.model_validate({"prompt": text + more}) for more in _GO_ON]
    forms = [SharedPrefix(path, "prompt", _common(raw, tokenizer))]
    system = {"role": "system", "content": text}
    chats = [
        ChatCompletionRequest.model_validate({"messages": [system, {"role": "user", "content": more}]})
        for more in _GO_ON
    ]
    with contextlib.suppress(InvalidRequestError):  # the model takes no conversations, or none with a system message
        forms.append(SharedPrefix(path, "system message", _common(chats, tokenizer)))
    return forms


def _common(requests: Iterable[ChatCompletionRequest | CompletionRequest], tokenizer: Tokenizer) -> list[int]:
    prompts = (render(request, {}, tokenizer).token_ids for request in requests)
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False))
    return [token for token, _ in pairs]
