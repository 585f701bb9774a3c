"""OpenAI's endpoints: each request becomes a program of one call, or of one call per prompt."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from macaw.errors import InvalidRequestError
from macaw.protocol import (
    AnswerFacts,
    Call,
    CallCompleted,
    CallDelta,
    CallFailed,
    ChatCompletionRequest,
    CompletionRequest,
    Hints,
    ProgramFailed,
    ProgramRequest,
    Target,
)
from macaw_server.http.guard import CLIENT_CLOSED_REQUEST, authenticated
from macaw_server.http.parsing import parse_openai, read_json
from macaw_server.http.streams import ProgramStream, wait_for_end
from macaw_server.service import ProgramRun, ProgramService, ServedModel, Tenant
from macaw_server.service.completions import add_usage
from macaw_server.service.tools import tool_format


class OpenAIEndpoints:
    """Handlers of the OpenAI-compatible routes."""

    def __init__(self, service: ProgramService) -> None:
        self._service = service
        self._config = service.config

    def routes(self) -> list[Route]:
        """Path, handler and methods of each."""
        table = [
            ("/v1/chat/completions", self.chat, "POST"),
            ("/v1/completions", self.complete, "POST"),
            ("/v1/tokenize", self.tokenize, "POST"),
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{name:path}", self.model, "GET"),
        ]
        return [
            Route(path, authenticated(self._service, endpoint), methods=[method]) for path, endpoint, method in table
        ]

    async def chat(self, request: Request, tenant: Tenant) -> Response:
        """A chat completion."""
        self._service.check_room(tenant)
        body = await read_json(request, self._config.max_body_bytes)
        return await self._answer(request, tenant, parse_openai(ChatCompletionRequest, body))

    async def complete(self, request: Request, tenant: Tenant) -> Response:
        """A text completion of one or several prompts."""
        self._service.check_room(tenant)
        body = await read_json(request, self._config.max_body_bytes)
        return await self._answer(request, tenant, parse_openai(CompletionRequest, body))

    async def tokenize(self, request: Request, tenant: Tenant) -> Response:
        """The tokens of a chat's or a completion's prompt."""
        self._service.check_room(tenant)
        body = await read_json(request, self._config.max_body_bytes)
        if "messages" in body:
            tokens = await self._service.tokenize(parse_openai(ChatCompletionRequest, body))
        else:
            completion = parse_openai(CompletionRequest, body)
            if not isinstance(completion.prompt, str):
                raise InvalidRequestError("One prompt of text is counted at a time. Send a string.", param="prompt")
            tokens = await self._service.tokenize(completion)
        return JSONResponse(tokens.model_dump())

    async def models(self, request: Request, tenant: Tenant) -> Response:
        """The served models."""
        return JSONResponse({"object": "list", "data": [_model_object(model) for model in self._service.models]})

    async def model(self, request: Request, tenant: Tenant) -> Response:
        """One of them."""
        return JSONResponse(_model_object(self._service.models.find(request.path_params["name"])))

    async def _answer(
        self, request: Request, tenant: Tenant, body: ChatCompletionRequest | CompletionRequest
    ) -> Response:
        run = await self._service.submit(tenant, _as_program(body), hints=body.macaw or Hints())
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return ProgramStream(run, _chunks(run, body.n or 1, include_usage), ping_s=self._config.ping_s)
        if not await wait_for_end(run, request):
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if run.program.error is not None:
            raise run.program.error
        completions = [node.completion for node in run.program.calls.values() if node.completion is not None]
        return JSONResponse(_merged(completions) | _facts(run))


def _as_program(body: ChatCompletionRequest | CompletionRequest) -> ProgramRequest:
    """One call per prompt, all targets. The metadata shows what the client says of its application."""
    hints = body.macaw or Hints()
    calls = [Call(id=str(i), output=str(i), request=request) for i, request in enumerate(_one_prompt_each(body))]
    labels = hints.model_dump(exclude_none=True) | ({} if body.user is None else {"user": body.user})
    return ProgramRequest(
        model=body.model,
        calls=calls,
        targets=[Target(variable=call.output, objective=hints.objective or "latency") for call in calls],
        stream=bool(body.stream),
        metadata={name: str(value) for name, value in labels.items()},
    )


def _one_prompt_each(
    body: ChatCompletionRequest | CompletionRequest,
) -> Sequence[ChatCompletionRequest | CompletionRequest]:
    if isinstance(body, ChatCompletionRequest):
        return [body]
    if isinstance(body.prompt, str) or not isinstance(body.prompt[0], str | list):
        return [body]
    return [body.model_copy(update={"prompt": prompt}) for prompt in body.prompt]


async def _chunks(run: ProgramRun, num_choices: int, include_usage: bool) -> AsyncIterator[ServerSentEvent]:
    """OpenAI's stream: chunks, the usage where asked for, and the end or what went wrong."""
    offsets = {call_id: i * num_choices for i, call_id in enumerate(run.program.calls)}
    usage_field: dict[str, Any] = {"usage": None} if include_usage else {}
    last: dict[str, Any] = {}
    usage: dict[str, Any] | None = None
    async for event in run.events():
        match event:
            case CallDelta(call_id=call_id, chunk=chunk):
                choices = [choice | {"index": choice["index"] + offsets[call_id]} for choice in chunk["choices"]]
                last = chunk | {"id": last.get("id", chunk["id"]), "choices": choices}
                yield _data(last | usage_field)
            case CallCompleted(completion=completion):
                usage = completion["usage"] if usage is None else add_usage(usage, completion["usage"])
            case CallFailed(error=error) | ProgramFailed(error=error):
                yield _data({"error": error.model_dump()})
                return
    if include_usage:
        yield _data(last | {"choices": [], "usage": usage} | _facts(run))
    yield ServerSentEvent("[DONE]", sep="\n")


def _merged(completions: list[dict[str, Any]]) -> dict[str, Any]:
    """One completion of the completions of several prompts, choices numbered through."""
    merged = completions[0]
    for completion in completions[1:]:
        offset = len(merged["choices"])
        choices = [choice | {"index": offset + choice["index"]} for choice in completion["choices"]]
        usage = add_usage(merged["usage"], completion["usage"])
        merged = merged | {"choices": merged["choices"] + choices, "usage": usage}
    return merged


def _facts(run: ProgramRun) -> dict[str, Any]:
    first = next(iter(run.program.calls.values()))
    return {"macaw": AnswerFacts(program_id=run.shown_id, timings=first.timings).model_dump(exclude_defaults=True)}


def _model_object(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "macaw",
        "max_model_len": model.engine.info.max_model_len,
        "has_chat_template": bool(model.tokenizer.chat_template),
        "tool_calling": bool(model.tokenizer.chat_template) and tool_format(model) is not None,
    }


def _data(content: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(content, ensure_ascii=False, separators=(",", ":")), sep="\n")
