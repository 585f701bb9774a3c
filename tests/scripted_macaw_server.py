"""A server that answers chats, completions and programs by a fixed function of the prompt, and notes what it saw.

It validates requests with the wire types and executes programs as the protocol says; only the model is made
up. The last word of a prompt can steer it: see `Recorder.answer`.
"""

from __future__ import annotations

import asyncio
import hashlib
import html
import json
import re
import socket
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from macaw.errors import (
    CancelledError,
    ContextLengthError,
    EngineFailedError,
    InvalidProgramError,
    InvalidRequestError,
    MacawError,
)
from macaw.protocol import (
    CallCompleted,
    CallDelta,
    CallFailed,
    CallTimings,
    ChatCompletionRequest,
    CompletionRequest,
    ErrorBody,
    Event,
    ProgramCompleted,
    ProgramCreated,
    ProgramFailed,
    ProgramGrowth,
    ProgramRequest,
    TextPart,
    Totals,
    VariableResolved,
)

MODEL = {"max_model_len": 4096, "has_chat_template": True}
"""What the server says of its model."""


class Recorder:
    """What the server saw.

    Attributes:
        prompts: Every request's concrete prompt and parameters, as canonical JSON, however it came.
        requests: How many "chat", "completion", "program" and "growth" requests there were.
        programs: The program requests.
        growths: What they grew by.
        cancelled: Ids of programs that were stopped by their client.
        started: Set when a program has begun.
        down: Refuse programs, as another OpenAI-compatible server would.
        script: Answers a prompt in its own way, where it does not return None; it may raise a `MacawError`.
        hints: The field `macaw` of the chats and completions that had it, in the order of their arrival.
        model_reads: How often the models were asked for.
        peak: Most calls that were in flight at the same time.
    """

    def __init__(self) -> None:
        self.prompts: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.programs: list[ProgramRequest] = []
        self.growths: list[ProgramGrowth] = []
        self.cancelled: list[str] = []
        self.cancellation = threading.Event()
        self.started = threading.Event()
        self.down = False
        self.script: Callable[[str], str | None] = lambda prompt: None
        self.hints: list[dict[str, Any]] = []
        self.model_reads = 0
        self.in_flight = self.peak = 0

    @contextmanager
    def flying(self) -> Iterator[None]:
        """Count a call as in flight."""
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1

    def clear(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def answer(self, request: ChatCompletionRequest | CompletionRequest) -> str:
        """A few words made of the prompt, with characters that templates treat in their own way.

        The last word of the prompt may be an order: TOOLONG fails, FLAKY fails the first time that this
        prompt comes, JSON answers an object.
        """
        seen = request.model_copy(update={"stream": None, "stream_options": None, "macaw": None})
        canonical = seen.model_dump(exclude_none=True)
        prompt = prompt_of(request)
        if isinstance(request, CompletionRequest):
            canonical["prompt"] = prompt
        else:
            canonical["messages"] = [{"role": m.role, "content": text_of(m)} for m in request.messages]
        key = json.dumps(canonical, sort_keys=True)
        self.prompts[key] += 1
        if (scripted := self.script(prompt)) is not None:
            return scripted
        if prompt.endswith("TOOLONG"):
            raise ContextLengthError("Context of 12 tokens is over the model's 10. Shorten the prompt.")
        if prompt.endswith("FLAKY") and self.prompts[key] == 1:
            raise EngineFailedError("The engine died.")
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        if prompt.endswith("JSON"):
            return json.dumps({"name": digest, "length": len(prompt)})
        text = f'{digest} says: "{{{prompt[:6].strip()}}}" <b>&</b> that\'s\n it. END more'
        for stop in request.stop_strings:
            text = text.split(stop)[0]
        return " ".join(text.split(" ")[: request.max_tokens])


def text_of(message: Any) -> str:
    return "".join(part.text for part in message.parts)


def prompt_of(request: ChatCompletionRequest | CompletionRequest) -> str:
    """The text that the model answers to: the last message, or the prompt."""
    return text_of(request if isinstance(request, CompletionRequest) else request.messages[-1])


class ScriptedServer:
    """The ASGI application."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.count = 0
        self.running: dict[str, asyncio.Task[None]] = {}
        self.growing: dict[str, asyncio.Queue[ProgramGrowth]] = {}
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completion, methods=["POST"]),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/programs", self.program, methods=["POST"]),
                Route("/v1/programs/{id}/calls", self.grow, methods=["POST"]),
                Route("/v1/programs/{id}", self.cancel, methods=["DELETE"]),
            ]
        )

    async def chat(self, request: Request) -> Response:
        self.recorder.requests["chat"] += 1
        return await self.respond(ChatCompletionRequest, request)

    async def completion(self, request: Request) -> Response:
        self.recorder.requests["completion"] += 1
        return await self.respond(CompletionRequest, request)

    async def models(self, request: Request) -> Response:
        self.recorder.model_reads += 1
        model = {"id": "m", "object": "model", "created": 1, "owned_by": "macaw"}
        return JSONResponse({"object": "list", "data": [{**model, **MODEL}]})

    async def respond(self, kind: type[ChatCompletionRequest | CompletionRequest], request: Request) -> Response:
        try:
            body = kind.model_validate_json(await request.body())
            if body.macaw:
                self.recorder.hints.append(body.macaw.model_dump(exclude_none=True))
            with self.recorder.flying():
                completion, chunks = self.complete(body)
                await asyncio.sleep(0)
        except ValidationError as error:
            return failure(InvalidRequestError(str(error)))
        except MacawError as error:
            return failure(error)
        facts = {"macaw": {"program_id": f"prog-of-{completion['id']}", "timings": {}}}
        if not body.stream:
            return JSONResponse({**completion, **facts})
        if body.stream_options and body.stream_options.include_usage:
            chunks.append({**chunks[-1], "choices": [], "usage": completion["usage"], **facts})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
        return StreamingResponse(iter(lines), media_type="text/event-stream")

    def complete(
        self, request: ChatCompletionRequest | CompletionRequest
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A completion and its chunks, in OpenAI's form."""
        text = self.recorder.answer(request)
        self.count += 1
        head = {"id": f"chatcmpl-{self.count}", "created": 1, "model": request.model}
        num_prompt, num_out = sum(len(part.text) for part in request.parts), len(text.split(" "))
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_out,
            "total_tokens": num_prompt + num_out,
            "prompt_tokens_details": {"cached_tokens": num_prompt // 2},
        }
        words = re.findall(r"\S*\s*", text)[:-1]
        if isinstance(request, CompletionRequest):
            return self.text_completion({**head, "id": f"cmpl-{self.count}"}, text, words, usage)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        completion = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": ""}, None)]
        deltas += [({"content": word}, None) for word in words] + [({}, "stop")]
        chunks = [
            {
                **head,
                "object": "chat.completion.chunk",
                "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}],
            }
            for delta, reason in deltas
        ]
        return completion, chunks

    @staticmethod
    def text_completion(
        head: dict[str, Any], text: str, words: list[str], usage: dict[str, Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        head["object"] = "text_completion"
        choices = [{"index": 0, "text": word, "finish_reason": None, "logprobs": None} for word in words]
        choices.append({"index": 0, "text": "", "finish_reason": "stop", "logprobs": None})
        chunks = [{**head, "choices": [choice]} for choice in choices]
        return {**head, "choices": [{**choices[-1], "text": text}], "usage": usage}, chunks

    async def program(self, request: Request) -> Response:
        self.recorder.requests["program"] += 1
        if self.recorder.down:
            return Response("no such route", 404)
        program = ProgramRequest.model_validate_json(await request.body())
        self.recorder.programs.append(program)
        program_id = f"prog-{len(self.recorder.programs)}"
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.growing[program_id] = asyncio.Queue()
        self.running[program_id] = asyncio.create_task(self.run(program_id, program, events))
        return StreamingResponse(self.send(program_id, events), media_type="text/event-stream")

    async def send(self, program_id: str, events: asyncio.Queue[Event | None]) -> AsyncIterator[str]:
        sequence = 0
        try:
            while (event := await events.get()) is not None:
                event.sequence = sequence
                kind = event.type  # type: ignore[attr-defined]
                yield f"id: {sequence}\nevent: {kind}\ndata: {event.model_dump_json()}\n\n"
                sequence += 1
        finally:
            self.stop(program_id)

    async def grow(self, request: Request) -> Response:
        self.recorder.requests["growth"] += 1
        program_id = request.path_params["id"]
        growth = ProgramGrowth.model_validate_json(await request.body())
        if self.recorder.down or self.running[program_id].done():
            return failure(InvalidProgramError(f"Program {program_id!r} has ended."))
        self.recorder.growths.append(growth)
        self.growing[program_id].put_nowait(growth)
        return Response(status_code=204)

    async def cancel(self, request: Request) -> Response:
        self.stop(request.path_params["id"])
        return Response(status_code=204)

    def stop(self, program_id: str) -> None:
        if self.running[program_id].cancel() and program_id not in self.recorder.cancelled:
            self.recorder.cancelled.append(program_id)
            self.recorder.cancellation.set()

    async def run(self, program_id: str, program: ProgramRequest, events: asyncio.Queue[Event | None]) -> None:
        events.put_nowait(ProgramCreated(program_id=program_id))
        self.recorder.started.set()
        loop = asyncio.get_running_loop()
        values: defaultdict[str, asyncio.Future[str]] = defaultdict(loop.create_future)
        limit = asyncio.Semaphore(program.max_concurrency or 1000)

        async def run_call(call: Any) -> None:
            try:
                known = {name: await values[name] for name in call.inputs}
                request = fill(call.request, known)
                async with limit:
                    with self.recorder.flying():
                        if prompt_of(request).endswith("HOLD"):
                            await asyncio.Event().wait()
                        completion, chunks = self.complete(request)
                        await asyncio.sleep(0)
                    for chunk in chunks:
                        events.put_nowait(CallDelta(call_id=call.id, chunk=chunk))
                        await asyncio.sleep(0)
            except MacawError as error:
                body = ErrorBody(**error.to_wire())
                events.put_nowait(CallFailed(call_id=call.id, error=body, timings=CallTimings()))
                values[call.output].set_exception(error)
                return
            events.put_nowait(CallCompleted(call_id=call.id, completion=completion, timings=CallTimings()))
            choice = completion["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            events.put_nowait(VariableResolved(variable=call.output, value=text))
            values[call.output].set_result(text)

        async def run_transform(transform: Any) -> None:
            try:
                inputs = [await values[name] for name in transform.inputs]
                if transform.op == "join":
                    assert transform.args["strip"]
                    assert transform.args["drop_blank"]
                    output = transform.args["separator"].join(text.strip() for text in inputs if text.strip())
                else:
                    assert transform.op == "html_escape"
                    output = html.escape(inputs[0], quote=False).replace('"', "&quot;")
                values[transform.output].set_result(output)
            except MacawError as error:
                values[transform.output].set_exception(error)

        end: Event
        try:
            targets, is_open, part = (
                [*program.targets],
                program.open,
                ProgramGrowth(calls=program.calls, transforms=program.transforms),
            )
            async with asyncio.TaskGroup() as group:
                while True:
                    for call in part.calls:
                        group.create_task(run_call(call))
                    for transform in part.transforms:
                        group.create_task(run_transform(transform))
                    if not is_open:
                        break
                    part = await self.growing[program_id].get()
                    targets += part.targets
                    is_open = not part.close
            errors = [error for value in values.values() if (error := value.exception())]
            variables = {
                target.variable: values[target.variable].result()
                for target in targets
                if not values[target.variable].exception()
            }
            common: dict[str, Any] = {
                "program_id": program_id,
                "variables": variables,
                "totals": Totals(),
                "duration_ms": 1.0,
            }
            if errors:
                assert isinstance(errors[0], MacawError)
                end = ProgramFailed(**common, error=ErrorBody(**errors[0].to_wire()))
            else:
                end = ProgramCompleted(**common, critical_path=[])
        except asyncio.CancelledError:
            error = ErrorBody(**CancelledError("The program was cancelled by its client.").to_wire())
            end = ProgramFailed(program_id=program_id, variables={}, totals=Totals(), duration_ms=1.0, error=error)
        events.put_nowait(end)
        events.put_nowait(None)


def fill(request: Any, known: dict[str, str]) -> Any:
    """`request` with the values of its variables."""
    if isinstance(request, CompletionRequest):
        return request.model_copy(update={"prompt": render(request, known)})
    messages = [message.model_copy(update={"content": render(message, known)}) for message in request.messages]
    return request.model_copy(update={"messages": messages})


def render(message: Any, known: dict[str, str]) -> str:
    return "".join(part.text if isinstance(part, TextPart) else known[part.variable] for part in message.parts)


def failure(error: MacawError) -> Response:
    return JSONResponse({"error": error.to_wire()}, status_code=error.status)


@contextmanager
def serving(recorder: Recorder) -> Iterator[str]:
    """Serve on a free local port; the value is the base URL."""
    # Not `create_server`: asyncio turns Nagle's algorithm off only where the protocol is given.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # before the server does: nothing to wait for
        config = uvicorn.Config(ScriptedServer(recorder).app, log_level="warning", ws="none", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()
