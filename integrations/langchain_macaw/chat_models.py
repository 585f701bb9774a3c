"""`ChatMacaw`: `ChatOpenAI` for a Macaw server."""

from __future__ import annotations

import os
from typing import Any, Self

from langchain_core.callbacks import Callbacks
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables.config import ContextThreadPoolExecutor
from langchain_core.utils import secret_from_env
from langchain_openai.chat_models.base import BaseChatOpenAI
from pydantic import Field, SecretStr, model_validator

from langchain_macaw.completions import AsyncReplayingCompletions, ReplayingCompletions
from macaw import AsyncMacawClient, MacawClient
from macaw.connections import shared_async_client, shared_client

_SAMPLING_EXTENSIONS = ("top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids")
"""Fields of the protocol that OpenAI's API, and so its client, does not have."""
_MAX_THREADS = 64
_CLIENT_FIELDS = {"client", "async_client", "root_client", "root_async_client"}


class ChatMacaw(BaseChatOpenAI):
    """A chat model on a Macaw server, in the place of `ChatOpenAI`.

    It takes `ChatOpenAI`'s arguments; what the server does not know it refuses by name. In a chain that went
    through `langchain_macaw.compile`, its answers come from the chain's program.

    Example:
        .. code-block:: python

            llm = ChatMacaw(model="my-model", base_url="http://127.0.0.1:8000/v1", temperature=0)
            llm.invoke("Name three parrots.")

    Args:
        model: A served model's name.
        base_url: The server. Default: `MACAW_BASE_URL`, else ``http://127.0.0.1:8000/v1``.
        api_key: Default: `MACAW_API_KEY`; a server without keys takes any.
        http_client: An `httpx.Client` for requests and programs alike, such as one with a proxy.
        http_async_client: An `httpx.AsyncClient`; it must fit all event loops that the model is used from.
    """

    model_name: str = Field(alias="model")
    openai_api_base: str | None = Field(
        default_factory=lambda: os.environ.get("MACAW_BASE_URL", "http://127.0.0.1:8000/v1"), alias="base_url"
    )
    openai_api_key: SecretStr | None = Field(
        default_factory=secret_from_env("MACAW_API_KEY", default="none"), alias="api_key"
    )
    max_tokens: int | None = Field(default=None, alias="max_completion_tokens")
    http_client: Any | None = Field(default_factory=shared_client, exclude=True)
    http_async_client: Any | None = Field(default_factory=shared_async_client, exclude=True)
    openai_proxy: str | None = None
    http_socket_options: Any | None = Field(default=(), exclude=True)
    stream_usage: bool | None = True

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

    @model_validator(mode="after")
    def _speak_chat_completions(self) -> Self:
        """Macaw has no responses API."""
        if self.use_responses_api or self.output_version == "responses/v1":
            raise ValueError(
                "ChatMacaw speaks /v1/chat/completions. Leave out use_responses_api and output_version='responses/v1'."
            )
        self.use_responses_api = False
        return self

    @model_validator(mode="after")
    def _answer_from_plans(self) -> Self:
        """Put the replay between the model and `openai`'s clients."""
        if self.root_client is not None:
            self.client = ReplayingCompletions(self.root_client)
        if self.root_async_client is not None:
            self.async_client = AsyncReplayingCompletions(self.root_async_client)
        return self

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Fields that are written as a reference to an environment variable."""
        return {"openai_api_key": "MACAW_API_KEY"}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """It can be written by `langchain_core.load.dumps`."""
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where `langchain_core.load` finds the class."""
        return ["langchain_macaw", "chat_models"]

    @property
    def _llm_type(self) -> str:
        return "macaw-chat"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return LangSmithParams(**{**super()._get_ls_params(stop=stop, **kwargs), "ls_provider": "macaw"})

    @property
    def _default_params(self) -> dict[str, Any]:
        extensions = {name: getattr(self, name) for name in _SAMPLING_EXTENSIONS}
        return {
            **super()._default_params,
            **{name: value for name, value in extensions.items() if value is not None},
        }

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        payload = super()._get_request_payload(input_, stop=stop, **kwargs)
        extensions = {name: payload.pop(name) for name in _SAMPLING_EXTENSIONS if name in payload}
        if extensions:
            payload["extra_body"] = {**extensions, **(payload.get("extra_body") or {})}
        return payload

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:
        """As `BaseChatModel.generate`, but several prompts run at the same time."""
        if len(messages) < 2:
            return super().generate(messages, stop, callbacks, **kwargs)
        run_ids = [kwargs.pop("run_id", None), *[None] * (len(messages) - 1)]
        generate = super().generate
        with ContextThreadPoolExecutor(min(len(messages), _MAX_THREADS)) as pool:
            futures = [
                pool.submit(generate, [prompt], stop, callbacks, run_id=run_id, **kwargs)
                for prompt, run_id in zip(messages, run_ids, strict=True)
            ]
            results = [future.result() for future in futures]
        return LLMResult(
            generations=[result.generations[0] for result in results],
            llm_output=self._combine_llm_outputs([result.llm_output for result in results]),
            run=[run for result in results for run in result.run or []] or None,
        )

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        return super()._combine_llm_outputs([_without_none(output) for output in llm_outputs])

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections stay behind; a model that was given its own HTTP client cannot be pickled."""
        fields = {name: getattr(self, name) for name in self.model_fields_set - _CLIENT_FIELDS}
        return _rebuild, (type(self), fields)

    # -------------------------------------------------------------------------------------------------------
    # For `langchain_macaw.compile`

    def _can_join(self, other: ChatMacaw | None) -> bool:
        """Whether a call of this model can be part of a program that is sent as `other`'s."""
        own_headers = self.default_headers or self.default_query or self.include_response_headers
        return (
            not own_headers
            and isinstance(self.openai_api_key, SecretStr)
            and (other is None or self._endpoint == other._endpoint)
        )

    @property
    def _endpoint(self) -> tuple[Any, ...]:
        return self.openai_api_base, self.openai_api_key, self.http_client, self.http_async_client

    def _program_client(self) -> MacawClient:
        """A client for programs with this model's server, key, timeout and HTTP client."""
        return MacawClient(http_client=self.http_client, **self._program_client_arguments())

    def _async_program_client(self) -> AsyncMacawClient:
        """The asynchronous counterpart of `_program_client`."""
        return AsyncMacawClient(http_client=self.http_async_client, **self._program_client_arguments())

    def _program_client_arguments(self) -> dict[str, Any]:
        assert isinstance(self.openai_api_key, SecretStr)
        arguments: dict[str, Any] = {
            "base_url": self.openai_api_base,
            "api_key": self.openai_api_key.get_secret_value(),
        }
        if isinstance(self.request_timeout, int | float):
            arguments["timeout_s"] = self.request_timeout
        return arguments


def _rebuild(cls: type[ChatMacaw], fields: dict[str, Any]) -> ChatMacaw:
    return cls(**fields)


def _without_none(output: Any) -> Any:
    """Counts that the server does not give: `BaseChatOpenAI` cannot add them up."""
    if not isinstance(output, dict):
        return output
    return {key: _without_none(value) for key, value in output.items() if value is not None}
