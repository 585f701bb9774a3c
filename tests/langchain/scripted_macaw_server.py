"""A server that answers chats and programs by a fixed function of the prompt, and notes what it saw.

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
from collections.abc import AsyncIterator, Iterator
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
    ErrorBody,
    Event,
    ProgramCompleted,
    ProgramCreated,
    ProgramFailed,
    ProgramGrowth,
    ProgramRequest,
    ProgramState,
    TextPart,
    Totals,
    VariableResolved,
)


class Recorder:
    """What the server saw.

    Attributes:
        prompts: Every request's concrete prompt and parameters, as canonical JSON, however it came.
        requests: How many "chat", "program" and "growth" requests there were.
        programs: The program requests.
        growths: What they grew by.
        cancelled: Ids of programs that were stopped by their client.
        down: Refuse programs, as another OpenAI-compatible server would.
    """

    def __init__(self) -> None:
        self.prompts: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.programs: list[ProgramRequest] = []
        self.growths: list[ProgramGrowth] = []
        self.cancelled: list[str] = []
        self.cancellation = threading.Event()
        self.down = False

    def clear(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def answer(self, request: ChatCompletionRequest) -> str:
        """A few words made of the prompt, with characters that templates treat in their own way.

        The last word of the prompt may be an order: TOOLONG fails, FLAKY fails the first time that this
        prompt comes, JSON answers an object.
        """
        seen = request.model_copy(update={"stream": None, "stream_options": None})
        canonical = seen.model_dump(exclude_none=True)
        canonical["messages"] = [{"role": m.role, "content": text_of(m)} for m in request.messages]
        key = json.dumps(canonical, sort_keys=True)
        self.prompts[key] += 1
        prompt = text_of(request.messages[-1])
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
                Route("/v1/programs", self.program, methods=["POST"]),
                Route("/v1/programs/{id}/calls", self.grow, methods=["POST"]),
                Route("/v1/programs/{id}", self.cancel, methods=["DELETE"]),
            ]
        )

    async def chat(self, request: Request) -> Response:
        self.recorder.requests["chat"] += 1
        try:
            body = ChatCompletionRequest.model_validate_json(await request.body())
            completion, chunks = self.complete(body)
        except ValidationError as error:
            return failure(InvalidRequestError(str(error)))
        except MacawError as error:
            return failure(error)
        if not body.stream:
            return JSONResponse(completion)
        if body.stream_options and body.stream_options.include_usage:
            chunks.append({**chunks[-1], "choices": [], "usage": completion["usage"]})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
        return StreamingResponse(iter(lines), media_type="text/event-stream")

    def complete(self, request: ChatCompletionRequest) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A completion and its chunks, in OpenAI's form."""
        text = self.recorder.answer(request)
        self.count += 1
        head = {"id": f"chatcmpl-{self.count}", "created": 1, "model": request.model}
        num_prompt, num_out = sum(len(text_of(m)) for m in request.messages), len(text.split(" "))
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_out,
            "total_tokens": num_prompt + num_out,
            "prompt_tokens_details": {"cached_tokens": num_prompt // 2},
        }
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        completion = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        words = re.findall(r"\S*\s*", text)[:-1]
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
        state = ProgramState(
            id=program_id,
            status="running",
            model="m",
            calls=[],
            transforms=[],
            targets=[],
            variables={},
            critical_path=[],
            totals=Totals(),
            duration_ms=1.0,
            metadata={},
        )
        return JSONResponse(state.model_dump(mode="json"))

    async def cancel(self, request: Request) -> Response:
        self.stop(request.path_params["id"])
        return Response(status_code=204)

    def stop(self, program_id: str) -> None:
        if self.running[program_id].cancel() and program_id not in self.recorder.cancelled:
            self.recorder.cancelled.append(program_id)
            self.recorder.cancellation.set()

    async def run(self, program_id: str, program: ProgramRequest, events: asyncio.Queue[Event | None]) -> None:
        events.put_nowait(ProgramCreated(program_id=program_id))
        loop = asyncio.get_running_loop()
        values: defaultdict[str, asyncio.Future[str]] = defaultdict(loop.create_future)
        limit = asyncio.Semaphore(program.max_concurrency or 1000)

        async def run_call(call: Any) -> None:
            try:
                known = {name: await values[name] for name in call.inputs}
                messages = [
                    message.model_copy(update={"content": render(message, known)}) for message in call.request.messages
                ]
                async with limit:
                    if text_of(messages[-1]).endswith("HOLD"):
                        await asyncio.Event().wait()
                    completion, chunks = self.complete(call.request.model_copy(update={"messages": messages}))
                    for chunk in chunks:
                        events.put_nowait(CallDelta(call_id=call.id, chunk=chunk))
                        await asyncio.sleep(0)
            except MacawError as error:
                body = ErrorBody(**error.to_wire())
                events.put_nowait(CallFailed(call_id=call.id, error=body, timings=CallTimings()))
                values[call.output].set_exception(error)
                return
            events.put_nowait(CallCompleted(call_id=call.id, completion=completion, timings=CallTimings()))
            text = completion["choices"][0]["message"]["content"]
            events.put_nowait(VariableResolved(variable=call.output, value=text))
            values[call.output].set_result(text)

        async def run_transform(transform: Any) -> None:
            assert transform.op == "html_escape"
            try:
                value = await values[transform.inputs[0]]
                values[transform.output].set_result(html.escape(value, quote=False).replace('"', "&quot;"))
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


def render(message: Any, known: dict[str, str]) -> str:
    return "".join(part.text if isinstance(part, TextPart) else known[part.variable] for part in message.parts)


def failure(error: MacawError) -> Response:
    return JSONResponse({"error": error.to_wire()}, status_code=error.status)


@contextmanager
def serving(recorder: Recorder) -> Iterator[str]:
    """Serve on a free local port; the value is the base URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # listens before the server does: nothing to wait for
        config = uvicorn.Config(ScriptedServer(recorder).app, log_level="warning", ws="none", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()
