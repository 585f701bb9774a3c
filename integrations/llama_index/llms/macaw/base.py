"""`Macaw`: `OpenAI` or `OpenAILike` for a Macaw server."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any, Self

import openai
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.openai import OpenAI
from llama_index.llms.openai_like import OpenAILike
from openai.lib._pydantic import to_strict_json_schema

from llama_index.llms.macaw.clients import AsyncClient, Client, Served, read_served
from llama_index.llms.macaw.hints import ahinted, hinted, install
from llama_index.llms.macaw.replay import areplaying, replaying
from macaw import AsyncMacawClient, MacawClient
from macaw.connections import shared_async_client, shared_client

_EXTENSIONS = ("top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids")
"""Fields of the protocol that OpenAI's API, and so its client, does not have."""
_NOT_IN_EVERY_ENDPOINT = ("response_format", "structured_outputs")
"""Fields of both of Macaw's endpoints, of which `openai`'s client takes only some."""
_DEFAULT_URL = "http://127.0.0.1:8000/v1"
_MOST_OUTPUT_TOKENS = 1024


class Macaw(OpenAILike):
    """A model on a Macaw server, in the place of `OpenAI` or `OpenAILike`.

    It takes their arguments. Its context window, whether it chats and whether it calls functions it asks the
    server, when that is first needed; what is passed here is not asked for.

    Example:
        .. code-block:: python

            llm = Macaw(model="my-model", api_base="http://127.0.0.1:8000/v1")
            llm.complete("Name three parrots.")

    Args:
        model: A served model's name. Default: the only one that the server has.
        api_base: The server. Default: `MACAW_BASE_URL`, else ``http://127.0.0.1:8000/v1``. `base_url` is the same.
        api_key: Default: `MACAW_API_KEY`; a server without keys takes any. It is not in `to_dict`.
        max_tokens: Longest answer; always sent. Default: a quarter of the context window, at most 1,024, for
            which LlamaIndex leaves room when it packs prompts.
        timeout: Longest silence of the server, seconds. Default: 600.
        http_client: An `httpx.Client`, such as one with a proxy.
        async_http_client: An `httpx.AsyncClient`; it must fit all event loops that the model is used from.

    Raises:
        ValueError: An argument that there is none of.
    """

    model: str = Field(default="", description="The served model; empty for the only one.")
    timeout: float = Field(default=600.0, description="Longest silence of the server, seconds.", ge=0)
    api_key: str | None = Field(default=None, description="The server's API key.", exclude=True, repr=False)
    default_headers: dict[str, str] | None = Field(
        default=None, description="Headers of every request.", exclude=True, repr=False
    )
    context_window: int | None = Field(  # type: ignore[assignment]  # None: as the server says
        default=None, description="Tokens of prompt and answer together."
    )
    is_chat_model: bool | None = Field(  # type: ignore[assignment]
        default=None, description="Whether it is prompted through its chat template."
    )
    is_function_calling_model: bool | None = Field(  # type: ignore[assignment]
        default=None, description="Whether it is given tools."
    )
    should_use_structured_outputs: bool = Field(
        default=True, description="Whether the server holds structured answers to their schema."
    )
    hints: bool = Field(default=True, description="Whether the server is told what belongs together.")

    top_k: int | None = Field(default=None, description="Candidates kept; 0 is off.")
    min_p: float | None = Field(default=None, description="Least probability relative to the most likely one's.")
    repetition_penalty: float | None = Field(default=None, description="Divides the logits of seen tokens; 1 is off.")
    ignore_eos: bool | None = Field(default=None, description="Go on to max_tokens, whatever the model says.")
    min_tokens: int | None = Field(default=None, description="Output tokens before the model may stop.")
    stop_token_ids: list[int] | None = Field(default=None, description="Tokens that end the output.")

    _served: Served | None = PrivateAttr(default=None)

    def __init__(self, model: str = "", **kwargs: Any) -> None:
        accepted = {*type(self).model_fields, *inspect.signature(OpenAI.__init__).parameters, "base_url"}
        if unknown := sorted(kwargs.keys() - accepted):
            raise ValueError(f"{type(self).__name__} has no {', '.join(unknown)}. See additional_kwargs.")
        api_base = kwargs.pop("base_url", None) or kwargs.pop("api_base", None)
        api_base = api_base or os.environ.get("MACAW_BASE_URL") or _DEFAULT_URL
        kwargs["api_base"] = api_base.rstrip("/").removesuffix("/v1") + "/v1"
        kwargs["api_key"] = kwargs.get("api_key") or os.environ.get("MACAW_API_KEY") or "none"
        super().__init__(model=model, **{"timeout": 600.0, **kwargs})
        self.api_version = None  # there is none; the base class reads it from OpenAI's environment
        if self.hints:
            install()

    @classmethod
    def class_name(cls) -> str:
        """The name under which it is serialized."""
        return "Macaw"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans with; the server is asked once for what was not passed.

        Raises:
            openai.APIError: The server cannot be asked, or does not serve the model.
        """
        return LLMMetadata(
            context_window=self._context_window,
            num_output=self._num_output,
            is_chat_model=self._is("is_chat_model", True),
            is_function_calling_model=self._is("is_function_calling_model", False),
            model_name=self.model or self._read_served().name,
        )

    @property
    def _context_window(self) -> int:
        return self.context_window or self._read_served().context_window or DEFAULT_CONTEXT_WINDOW

    @property
    def _num_output(self) -> int:
        return self.max_tokens or min(max(self._context_window // 4, 1), _MOST_OUTPUT_TOKENS)

    def _is(self, what: str, default: bool) -> bool:
        passed: bool | None = getattr(self, what)
        if passed is not None:
            return passed
        said: bool | None = getattr(self._read_served(), what)
        return default if said is None else said

    def _read_served(self) -> Served:
        if self._served is None or self.model not in ("", self._served.name):
            self._served = read_served(self._get_client(), self.model or None)
        return self._served

    # -------------------------------------------------------------------------------------------------------
    # What is sent

    def _get_client(self) -> openai.OpenAI:
        if not self.reuse_client:
            return Client(**self._get_credential_kwargs())
        if self._client is None:
            self._client = Client(**self._get_credential_kwargs())
        return self._client

    def _get_aclient(self) -> openai.AsyncOpenAI:
        if not self.reuse_client:
            return AsyncClient(**self._get_credential_kwargs(is_async=True))
        if self._aclient is None:
            self._aclient = AsyncClient(**self._get_credential_kwargs(is_async=True))
        return self._aclient

    def _get_credential_kwargs(self, is_async: bool = False) -> dict[str, Any]:
        options: dict[str, Any] = super()._get_credential_kwargs(is_async=is_async)
        # A client that is not reused is closed after its request, with its connections.
        if options["http_client"] is None and self.reuse_client:
            options["http_client"] = shared_async_client() if is_async else shared_client()
        if options["http_client"] is not None:
            wrap: Any = areplaying if is_async else replaying
            options["http_client"] = wrap(options["http_client"])
        return options

    def _get_model_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        payload: dict[str, Any] = super()._get_model_kwargs(**kwargs)
        payload["model"] = self.model or self._read_served().name
        if payload.get("max_completion_tokens") is None:
            payload["max_tokens"] = kwargs.get("max_tokens") or payload.get("max_tokens") or self._num_output
        else:
            payload.pop("max_tokens", None)
        if payload.get("stream"):
            payload.setdefault("stream_options", {"include_usage": True})
        extra = {name: value for name in _EXTENSIONS if (value := getattr(self, name)) is not None}
        extra |= {name: payload.pop(name) for name in (*_EXTENSIONS, *_NOT_IN_EVERY_ENDPOINT) if name in payload}
        extra |= {**(self.additional_kwargs.get("extra_body") or {}), **(kwargs.get("extra_body") or {})}
        return {**payload, "extra_body": extra} if extra else payload

    def _update_max_tokens(self, all_kwargs: dict[str, Any], prompt: str) -> None:
        """Nothing: `max_tokens` is always there."""

    def _should_use_structure_outputs(self) -> bool:
        return self.should_use_structured_outputs and self.pydantic_program_mode == PydanticProgramMode.DEFAULT

    def _prepare_schema(self, llm_kwargs: dict[str, Any] | None, output_cls: type[Any]) -> dict[str, Any]:
        """As the base class does, which looks for this in a module of `openai` that comes and goes."""
        kwargs = {name: value for name, value in (llm_kwargs or {}).items() if name != "tool_choice"}
        schema = {"name": output_cls.__name__, "schema": to_strict_json_schema(output_cls), "strict": True}
        return {**kwargs, "response_format": {"type": "json_schema", "json_schema": schema}}

    def _get_response_token_counts(self, raw_response: Any) -> dict[str, int]:
        counts: dict[str, int] = super()._get_response_token_counts(raw_response)
        details = getattr(getattr(raw_response, "usage", None), "prompt_tokens_details", None)
        if details is not None and details.cached_tokens is not None:
            counts["cached_tokens"] = details.cached_tokens
        return counts

    # -------------------------------------------------------------------------------------------------------
    # The base class builds the request of a stream when its first chunk is asked for: somewhere else. So hints
    # are taken here, which runs where the model is called.

    @property
    def _gives_hints(self) -> bool:
        return self.hints and "macaw" not in (self.additional_kwargs.get("extra_body") or {})

    def _chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        with hinted(self._gives_hints, kwargs) as kwargs:
            response: ChatResponse = super()._chat(messages, **kwargs)
            return response

    def _stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        with hinted(self._gives_hints, kwargs) as kwargs:
            response: ChatResponseGen = super()._stream_chat(messages, **kwargs)
            return response

    def _complete(self, prompt: str, **kwargs: Any) -> CompletionResponse:
        with hinted(self._gives_hints, kwargs) as kwargs:
            response: CompletionResponse = super()._complete(prompt, **kwargs)
            return response

    def _stream_complete(self, prompt: str, **kwargs: Any) -> CompletionResponseGen:
        with hinted(self._gives_hints, kwargs) as kwargs:
            response: CompletionResponseGen = super()._stream_complete(prompt, **kwargs)
            return response

    async def _achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        async with ahinted(self._gives_hints, kwargs) as kwargs:
            response: ChatResponse = await super()._achat(messages, **kwargs)
            return response

    async def _astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        async with ahinted(self._gives_hints, kwargs) as kwargs:
            response: ChatResponseAsyncGen = await super()._astream_chat(messages, **kwargs)
            return response

    async def _acomplete(self, prompt: str, **kwargs: Any) -> CompletionResponse:
        async with ahinted(self._gives_hints, kwargs) as kwargs:
            response: CompletionResponse = await super()._acomplete(prompt, **kwargs)
            return response

    async def _astream_complete(self, prompt: str, **kwargs: Any) -> CompletionResponseAsyncGen:
        async with ahinted(self._gives_hints, kwargs) as kwargs:
            response: CompletionResponseAsyncGen = await super()._astream_complete(prompt, **kwargs)
            return response

    # -------------------------------------------------------------------------------------------------------
    # For `llama_index.llms.macaw.compile`

    def _can_join(self, other: Macaw | None) -> bool:
        """Whether a call of this model can be part of a program that is sent as `other`'s."""
        is_ours = isinstance(self._client, Client | None) and isinstance(self._aclient, AsyncClient | None)
        joins = other is None or self._endpoint == other._endpoint
        return is_ours and self.reuse_client and not self.default_headers and joins

    @property
    def _endpoint(self) -> tuple[Any, ...]:
        return self.api_base, self.api_key, self._http_client, self._async_http_client

    def _program_client(self) -> MacawClient:
        """A client for programs with this model's server, key, timeout and HTTP client."""
        http_client = self._http_client or shared_client()
        return MacawClient(self.api_base, self.api_key, timeout_s=self.timeout, http_client=http_client)

    def _async_program_client(self) -> AsyncMacawClient:
        """The asynchronous counterpart of `_program_client`."""
        http_client = self._async_http_client or shared_async_client()
        return AsyncMacawClient(self.api_base, self.api_key, timeout_s=self.timeout, http_client=http_client)

    # -------------------------------------------------------------------------------------------------------
    # Copies

    def __getstate__(self) -> dict[str, Any]:
        """Connections stay behind; the key goes along."""
        bare = self.model_copy()
        bare._client = bare._aclient = None
        return super(Macaw, bare).__getstate__()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Connections and the clients on them are shared."""
        memo = {} if memo is None else memo
        for shared in (self._client, self._aclient, self._http_client, self._async_http_client):
            memo[id(shared)] = shared
        return super().__deepcopy__(memo)
