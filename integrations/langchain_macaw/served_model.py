"""What `ChatMacaw` and `MacawLLM` have in common: where their server is, its sampling, and how they travel."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from langchain_core.utils import secret_from_env
from pydantic import BaseModel, Field, SecretStr

from macaw.connections import shared_async_client, shared_client

SAMPLING_EXTENSIONS = ("top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids")
"""Fields of the protocol that OpenAI's API, and so its client, does not have."""
_NOT_PICKLED = {"client", "async_client", "root_client", "root_async_client"}


class ServedModel(BaseModel):
    """Stands before the class of `langchain_openai` among the bases, whose fields it gives Macaw's defaults."""

    model_name: str = Field(alias="model")
    openai_api_base: str | None = Field(
        default_factory=lambda: os.environ.get("MACAW_BASE_URL", "http://127.0.0.1:8000/v1"), alias="base_url"
    )
    openai_api_key: SecretStr | None = Field(
        default_factory=secret_from_env("MACAW_API_KEY", default="none"), alias="api_key"
    )
    openai_proxy: str | None = None
    http_client: Any | None = Field(default_factory=shared_client, exclude=True)
    http_async_client: Any | None = Field(default_factory=shared_async_client, exclude=True)

    top_k: int | None = None
    """Candidates kept; 0 is off."""
    min_p: float | None = None
    """Least probability of a candidate, relative to the most likely one's."""
    repetition_penalty: float | None = None
    """Divides the logits of tokens that prompt or output have; 1 is off."""
    ignore_eos: bool | None = None
    """Go on to `max_tokens`, whatever the model says."""
    min_tokens: int | None = None
    """Output tokens before the model may stop."""
    stop_token_ids: list[int] | None = None
    """Tokens that end the output."""

    hints: bool = True
    """Say with each request what it belongs to; see `langchain_macaw.hints`."""

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Fields that are written as a reference to an environment variable."""
        return {"openai_api_key": "MACAW_API_KEY"}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """It can be written by `langchain_core.load.dumps`."""
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections stay behind; a model that was given its own HTTP client cannot be pickled."""
        fields = {name: getattr(self, name) for name in self.model_fields_set - _NOT_PICKLED}
        return _rebuild, (type(self), fields)


def _rebuild(cls: type[ServedModel], fields: dict[str, Any]) -> ServedModel:
    return cls(**fields)


def moved_to_body(payload: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The payload with what `openai`'s client has no argument for in the body of the request."""
    body = {name: payload[name] for name in names if name in payload}
    if not body:
        return payload
    rest = {name: value for name, value in payload.items() if name not in body}
    return {**rest, "extra_body": {**body, **(payload.get("extra_body") or {})}}
