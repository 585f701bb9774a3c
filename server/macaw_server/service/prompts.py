"""Calls made ready for an engine: the model found, the prompt rendered and tokenised, length and grammar checked.

Tokenising a long document takes longer than a step, so it happens in threads, and other streams go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from macaw.errors import InvalidProgramError, InvalidRequestError, MacawError
from macaw.protocol import Call, ChatCompletionRequest, CompletionRequest
from macaw_server.programs.rendering import check_length, render
from macaw_server.service.constraints import GrammarChecker, grammar_of
from macaw_server.service.models import ModelRegistry
from macaw_server.service.sampling import check_request, requested_max_tokens
from macaw_server.service.tools import ToolUse, check_tools, tool_use
from macaw_server.service.types import ServedModel


class Prepared(NamedTuple):
    """What a call needs to be submitted.

    Attributes:
        model: Whose engine takes it.
        prompt_ids: The rendered prompt.
        max_tokens: The output limit in this context.
        grammar: What the output must match, as the engine takes it.
        tools: How calls are found in the output; None: it is text.
    """

    model: ServedModel
    prompt_ids: list[int]
    max_tokens: int
    grammar: str | None
    tools: ToolUse | None = None


class PromptPreparer:
    """Prepares calls in a few threads."""

    def __init__(self, models: ModelRegistry, num_threads: int = 2) -> None:
        self._models = models
        self._grammars = GrammarChecker()
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="macaw-render")

    async def prepare(self, call: Call, values: Mapping[str, str], model_name: str | None) -> Prepared:
        """Prepare one call whose inputs all have values.

        Raises:
            RequestError: The call cannot be served.
        """
        model = self._models.find_working(call.request.model or model_name)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _prepare, call.request, values, model)

    async def prepare_known(
        self, calls: Sequence[Call], values: Mapping[str, str], model_name: str | None, *, plain: bool
    ) -> dict[str, Prepared]:
        """Check all new calls, and prepare those whose inputs have values, before anything starts.

        Args:
            calls: The new ones.
            values: Of variables that are known by now.
            model_name: For calls that do not name their own.
            plain: They stand for OpenAI requests: errors speak of these rather than of a program.

        Raises:
            RequestError: A call cannot be served; `param` is the path of the offending field.
        """
        models = []
        for i, call in enumerate(calls):
            try:
                models.append(self._models.find_working(call.request.model or model_name))
                check_request(call.request, models[i].engine.info)
                check_tools(call.request, models[i])
                await self._grammars.check(call.request, tool_use(call.request, models[i]), models[i].tokenizer)
            except MacawError as e:
                raise _located(e, i, plain) from e
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _prepare_known, calls, models, values, plain)

    def close(self) -> None:
        """End the threads; what they are at is finished and dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._grammars.close()


def _prepare_known(
    calls: Sequence[Call], models: Sequence[ServedModel], values: Mapping[str, str], plain: bool
) -> dict[str, Prepared]:
    prepared = {}
    for i, (call, model) in enumerate(zip(calls, models, strict=True)):
        if all(name in values for name in call.inputs):
            try:
                prepared[call.id] = _prepare(call.request, values, model)
            except MacawError as e:
                raise _located(e, i, plain) from e
    return prepared


def _prepare(
    request: ChatCompletionRequest | CompletionRequest, values: Mapping[str, str], model: ServedModel
) -> Prepared:
    prompt_ids = render(request, values, model.tokenizer).token_ids
    limit = check_length(len(prompt_ids), requested_max_tokens(request), model.engine.info.max_model_len)
    tools = tool_use(request, model)
    grammar = grammar_of(request, tools)
    return Prepared(model, prompt_ids, limit, None if grammar is None else grammar.text, tools)


def _located(error: MacawError, index: int, plain: bool) -> MacawError:
    """The error with its path in the program, as the program's."""
    if plain:
        return error
    param = f"calls[{index}].request" + (f".{error.param}" if error.param else "")
    if isinstance(error, InvalidRequestError):
        return InvalidProgramError(error.message, param=param)
    error.param = param
    return error
