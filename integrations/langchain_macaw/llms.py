"""`MacawLLM`: text completions of a Macaw server, for chains that are written for plain models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.base import LangSmithParams
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_openai.llms.base import BaseOpenAI
from pydantic import Field, model_validator

from langchain_macaw.hints import awith_hints, follower, with_hints
from langchain_macaw.served import tokenize
from langchain_macaw.served_model import SAMPLING_EXTENSIONS, ServedModel, moved_to_body
from macaw import __version__

_OPENAI_PARAMETERS = (
    "temperature",
    "max_tokens",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "n",
    "seed",
    "logprobs",
    "logit_bias",
    "stop",
)


class MacawLLM(ServedModel, BaseOpenAI):
    """A text completion model on a Macaw server, in the place of `langchain_openai.OpenAI`.

    It takes that class's arguments. What is not given is not sent: the server's defaults count, and without
    `max_tokens` an answer may fill the context. Several prompts are one request, and run side by side.

    Example:
        .. code-block:: python

            llm = MacawLLM(model="my-model", base_url="http://127.0.0.1:8000/v1", temperature=0, max_tokens=50)
            llm.invoke("The macaw is")

    Args:
        model: A served model's name.
        base_url: The server. Default: `MACAW_BASE_URL`, else ``http://127.0.0.1:8000/v1``.
        api_key: Default: `MACAW_API_KEY`; a server without keys takes any.
        stop: Strings that end the answer.
    """

    openai_organization: str | None = None
    batch_size: int = 256

    temperature: float | None = None  # type: ignore[assignment]
    max_tokens: int | None = None  # type: ignore[assignment]
    top_p: float | None = None  # type: ignore[assignment]
    frequency_penalty: float | None = None  # type: ignore[assignment]
    presence_penalty: float | None = None  # type: ignore[assignment]
    stop: list[str] | str | None = Field(default=None, alias="stop_sequences")

    @model_validator(mode="after")
    def _set_macaw_version(self) -> Self:
        self._add_version("macaw", __version__)
        if self.best_of > 1:
            raise ValueError(f"best_of={self.best_of} is not served. Ask for n answers and pick one.")
        if self.hints:
            follower()
        return self

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where `langchain_core.load` finds the class."""
        return ["langchain_macaw", "llms"]

    @property
    def _llm_type(self) -> str:
        return "macaw-llm"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"], params["ls_model_name"] = "macaw", kwargs.get("model", self.model_name)
        return params

    @property
    def _default_params(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in (*_OPENAI_PARAMETERS, *SAMPLING_EXTENSIONS)}
        given = {name: value for name, value in values.items() if value is not None}
        if self.n == 1:
            del given["n"]
        body = {} if self.extra_body is None else {"extra_body": dict(self.extra_body)}
        return {"model": self.model_name, **given, **body, **self.model_kwargs}

    def _payload(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        payload = {**self._invocation_params, **kwargs}
        if stop is not None:
            payload["stop"] = stop
        return moved_to_body(payload, (*SAMPLING_EXTENSIONS, "response_format", "structured_outputs"))

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        if self.streaming and len(prompts) == 1:
            chunks = list(self._stream(prompts[0], stop, run_manager, **kwargs))
            return self._of_chunks(chunks)
        payload = self._payload(stop, with_hints(self, run_manager, kwargs))
        answers = [self.client.create(prompt=batch, **payload) for batch in self._batches(prompts)]
        return self._result(answers, payload.get("n") or 1)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        if self.streaming and len(prompts) == 1:
            chunks = [chunk async for chunk in self._astream(prompts[0], stop, run_manager, **kwargs)]
            return self._of_chunks(chunks)
        payload = self._payload(stop, await awith_hints(self, run_manager, kwargs))
        answers = [await self.async_client.create(prompt=batch, **payload) for batch in self._batches(prompts)]
        return self._result(answers, payload.get("n") or 1)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        payload = self._payload(stop, with_hints(self, run_manager, kwargs))
        with self.client.create(prompt=prompt, stream=True, **_with_usage(payload)) as answers:
            for answer in answers:
                chunk = self._chunk(answer.model_dump())
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        payload = self._payload(stop, await awith_hints(self, run_manager, kwargs))
        answers = await self.async_client.create(prompt=prompt, stream=True, **_with_usage(payload))
        async with answers:
            async for answer in answers:
                chunk = self._chunk(answer.model_dump())
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _batches(self, prompts: list[str]) -> list[list[str]]:
        return [prompts[i : i + self.batch_size] for i in range(0, len(prompts), self.batch_size)]

    def _result(self, answers: list[Any], num_choices: int) -> LLMResult:
        """LangChain's form of completions; usage is of all prompts together, as the server counts it."""
        dumped = [answer.model_dump() for answer in answers]
        choices = [
            Generation(
                text=choice["text"],
                generation_info={
                    "finish_reason": choice["finish_reason"],
                    "logprobs": choice["logprobs"],
                    **_facts(one),
                },
            )
            for one in dumped
            for choice in one["choices"]
        ]
        usage = [one["usage"] for one in dumped]
        total = {name: sum(one[name] for one in usage) for name in _USAGE}
        cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in usage)
        total["prompt_tokens_details"] = {"cached_tokens": cached}
        return LLMResult(
            generations=[choices[i : i + num_choices] for i in range(0, len(choices), num_choices)],
            llm_output={"token_usage": total, "model_name": dumped[0]["model"]},
        )

    def _of_chunks(self, chunks: list[GenerationChunk]) -> LLMResult:
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        info = dict(whole.generation_info or {})
        return LLMResult(
            generations=[[Generation(text=whole.text, generation_info=info)]],
            llm_output={"token_usage": info.get("token_usage", {}), "model_name": self.model_name},
        )

    def _chunk(self, answer: dict[str, Any]) -> GenerationChunk:
        if not answer["choices"]:
            return GenerationChunk(text="", generation_info={"token_usage": answer["usage"], **_facts(answer)})
        choice = answer["choices"][0]
        info = {name: choice[name] for name in ("finish_reason", "logprobs") if choice[name] is not None}
        return GenerationChunk(text=choice["text"] or "", generation_info=info or None)

    def get_token_ids(self, text: str) -> list[int]:
        """The served model's tokens of a text; asks the server."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return tokenize(self.client._client, {"model": self.model_name, "prompt": text}).tokens


_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


def _with_usage(payload: dict[str, Any]) -> dict[str, Any]:
    return {"stream_options": {"include_usage": True}, **payload}


def _facts(answer: dict[str, Any]) -> dict[str, Any]:
    return answer.get("macaw") or {}
