"""`ChatMacaw`: `ChatOpenAI` for a Macaw server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, Self, cast

import openai
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import ModelProfile
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable
from langchain_core.runnables.config import ContextThreadPoolExecutor
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_openai.chat_models.base import BaseChatOpenAI
from pydantic import Field, SecretStr, model_validator

from langchain_macaw.completions import AsyncReplayingCompletions, ReplayingCompletions
from langchain_macaw.hints import awith_hints, follower, with_hints
from langchain_macaw.served import served_profile, tokenize
from langchain_macaw.served_model import SAMPLING_EXTENSIONS, ServedModel, moved_to_body
from langchain_macaw.structured import parsed, response_format
from macaw import AsyncMacawClient, MacawClient, __version__

_ABOUT_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_MAX_THREADS = 64


class ChatMacaw(ServedModel, BaseChatOpenAI):
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

    max_tokens: int | None = Field(default=None, alias="max_completion_tokens")
    http_socket_options: Any | None = Field(default=(), exclude=True)
    stream_usage: bool | None = True

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

    @model_validator(mode="after")
    def _set_macaw_version(self) -> Self:
        self._add_version("macaw", __version__)
        if self.hints:
            follower()
        return self

    @model_validator(mode="after")
    def _set_model_profile(self) -> Self:
        """In place of the base's: `profile` asks the server when somebody reads it."""
        return self

    @model_validator(mode="after")
    def _check_profile_keys(self) -> Self:
        """In place of the base's, which would read it."""
        return self

    # -------------------------------------------------------------------------------------------------------
    # How LangChain writes and traces it

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where `langchain_core.load` finds the class."""
        return ["langchain_macaw", "chat_models"]

    @property
    def _llm_type(self) -> str:
        return "macaw-chat"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return LangSmithParams(**{**super()._get_ls_params(stop=stop, **kwargs), "ls_provider": "macaw"})

    # -------------------------------------------------------------------------------------------------------
    # Requests

    @property
    def _default_params(self) -> dict[str, Any]:
        extensions = {name: getattr(self, name) for name in SAMPLING_EXTENSIONS}
        return {
            **super()._default_params,
            **{name: value for name, value in extensions.items() if value is not None},
        }

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As the base's, with everything that `openai`'s client has no argument for, or an opinion on, in the body.

        That includes `response_format`: the client would refuse tools that are not strict, and answers that are cut
        off, and a plan could not answer.
        """
        payload = super()._get_request_payload(input_, stop=stop, **kwargs)
        if payload.get("tools") == []:  # as agents without tools bind them
            payload = {name: value for name, value in payload.items() if name not in _ABOUT_TOOLS}
        if (wanted := payload.pop("response_format", None)) is not None:
            payload["response_format"] = response_format(wanted)
        return moved_to_body(payload, (*SAMPLING_EXTENSIONS, "response_format"))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return super()._generate(messages, stop, run_manager, **with_hints(self, run_manager, kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        kwargs = await awith_hints(self, run_manager, kwargs)
        return await super()._agenerate(messages, stop, run_manager, **kwargs)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        return super()._stream(messages, stop, run_manager, **with_hints(self, run_manager, kwargs))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        kwargs = await awith_hints(self, run_manager, kwargs)
        native: Any = super()._astream(messages, stop, run_manager, **kwargs)
        async with aclosing(native) as chunks:
            async for chunk in chunks:
                yield chunk

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

    # -------------------------------------------------------------------------------------------------------
    # Answers

    def _create_chat_result(
        self, response: dict[str, Any] | openai.BaseModel, generation_info: dict[str, Any] | None = None
    ) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        facts = response.get("macaw") if isinstance(response, dict) else getattr(response, "macaw", None)
        for generation in result.generations:
            generation.message.response_metadata.update(facts or {})
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        generation = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        if generation is not None and (facts := chunk.get("macaw")):
            generation.message.response_metadata.update(facts)
        return generation

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        return super()._combine_llm_outputs([_without_none(output) for output in llm_outputs])

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: Literal["function_calling", "json_mode", "json_schema"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        tools: list[Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """A Runnable whose answers are instances of `schema`, or dicts.

        Args:
            schema: A pydantic class, a TypedDict, a JSON schema, or a tool as OpenAI writes it. May be left out for
                `json_mode`.
            method: `json_schema` holds the answer to the schema by a grammar; the model does not see it, so the prompt
                should say what is wanted. `function_calling` shows the schema to the model as a tool, and holds the
                answer to it too. `json_mode` holds the answer to any JSON object.
            include_raw: Answer with a dict of `raw`, `parsed` and `parsing_error` instead.
            strict: As in `ChatOpenAI`; the server holds answers to the schema either way.
            tools: Tools that the model may call instead (`json_schema` only); the answer is None then.
            kwargs: Bound to the model.
        """
        if method == "function_calling":
            return super().with_structured_output(
                schema, method=method, include_raw=include_raw, strict=strict, tools=tools, **kwargs
            )
        if method not in ("json_mode", "json_schema"):
            raise ValueError(f"method={method!r} is none. Give 'json_schema', 'function_calling' or 'json_mode'.")
        if strict is not None and method == "json_mode":
            raise ValueError("strict is for method='json_schema' and 'function_calling'. Leave it out for 'json_mode'.")
        if schema is None and method == "json_schema":
            raise ValueError("method='json_schema' needs a schema. Give one, or use method='json_mode'.")
        bound: dict[str, Any] = {"response_format": {"type": "json_object"}}
        described = schema
        if method == "json_schema":
            bound["response_format"] = response_format(schema, strict=strict)
            described = convert_to_openai_tool(schema)
        if tools:
            bound["tools"] = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        options = {"method": method} if method == "json_mode" else {"method": method, "strict": strict}
        llm = self.bind(**bound, ls_structured_output_format={"kwargs": options, "schema": described}, **kwargs)
        return parsed(llm, schema, include_raw=include_raw)

    # -------------------------------------------------------------------------------------------------------
    # What the server knows

    def get_token_ids(self, text: str) -> list[int]:
        """The served model's tokens of a text; asks the server."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return tokenize(self.root_client, {"model": self.model_name, "prompt": text}).tokens

    def get_num_tokens_from_messages(
        self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None, **_: Any
    ) -> int:
        """The length of the prompt that the server makes of these messages and tools; asks the server."""
        payload = self._get_request_payload(list(messages))
        body = {"model": payload["model"], "messages": payload["messages"]}
        if tools:
            body["tools"] = [convert_to_openai_tool(tool) for tool in tools]
        return tokenize(self.root_client, body).count

    def _served_profile(self) -> ModelProfile | None:
        """What `profile` is: as given, or else as the server says; None while it cannot be asked."""
        known = self.__dict__.get("profile")
        if not isinstance(known, Mapping):  # None, or in subclasses the property itself, taken for a default
            known = self.__dict__["profile"] = served_profile(self.root_client, self.model_name)
        return cast("ModelProfile | None", known)

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


def _set_profile(model: ChatMacaw, profile: ModelProfile | None) -> None:
    model.__dict__["profile"] = profile


# A field may not be a property, but an attribute of the class comes before what an instance has of that name.
ChatMacaw.profile = property(ChatMacaw._served_profile, _set_profile)  # type: ignore[assignment]


def _without_none(output: Any) -> Any:
    """Counts that the server does not give: `BaseChatOpenAI` cannot add them up."""
    if not isinstance(output, dict):
        return output
    return {key: _without_none(value) for key, value in output.items() if value is not None}
