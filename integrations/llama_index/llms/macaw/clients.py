"""`openai`'s clients, as a Macaw model uses them: for Macaw's server and with nothing of OpenAI's environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx
import openai

READ_TIMEOUT_S = 30.0


class Client(openai.OpenAI):
    """A synchronous client that sends no organization, project or header from the environment."""

    def __init__(self, *, default_headers: Mapping[str, str] | None, **options: Any) -> None:
        super().__init__(default_headers=default_headers, **options)
        self.organization = self.project = None
        self._custom_headers = default_headers or {}


class AsyncClient(openai.AsyncOpenAI):
    """The asynchronous `Client`."""

    def __init__(self, *, default_headers: Mapping[str, str] | None, **options: Any) -> None:
        super().__init__(default_headers=default_headers, **options)
        self.organization = self.project = None
        self._custom_headers = default_headers or {}


class Served(NamedTuple):
    """What a server says of a model.

    Attributes:
        name: Its name.
        context_window: Tokens of prompt and answer together; None where the server does not say.
        is_chat_model: It has a chat template; None where the server does not say.
        is_function_calling_model: It can be given tools; None where the server does not say.
    """

    name: str
    context_window: int | None
    is_chat_model: bool | None
    is_function_calling_model: bool | None


def read_served(client: openai.OpenAI, name: str | None) -> Served:
    """Ask the server for the model `name`, or for the only one that it serves.

    Raises:
        openai.APIError: The server cannot be asked, or does not serve it. The message says what to do.
    """
    try:
        models = list(client.models.list(timeout=READ_TIMEOUT_S))
    except openai.APIConnectionError as error:
        message = (
            f"No Macaw server at {client.base_url} ({error.__cause__ or error}), so nothing is known of the model. "
            "Start one with: macaw serve MODEL, or pass api_base."
        )
        raise openai.APIConnectionError(message=message, request=error.request) from error
    names = [model.id for model in models]
    found = [model for model in models if name in (None, model.id)]
    if len(found) != 1:
        asked = "No model was named" if name is None else f"The model {name!r} is not served"
        request = httpx.Request("GET", f"{client.base_url}models")
        message = f"{asked}; served by {client.base_url} are: {', '.join(names) or 'none'}. Pass one of these as model."
        raise openai.APIError(message, request, body=None)
    said = found[0].model_extra or {}
    return Served(
        name=found[0].id,
        context_window=said.get("max_model_len"),
        is_chat_model=said.get("has_chat_template"),
        is_function_calling_model=said.get("tool_calling"),
    )
