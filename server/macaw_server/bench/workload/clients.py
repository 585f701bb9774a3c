"""Two clients of the same applications: each call a request of its own, or the whole graph a program."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from macaw import AsyncMacawClient, MacawError, OverloadedError
from macaw._sse import SSEDecoder
from macaw.builder import ProgramBuilder, Ref
from macaw.protocol import (
    AnyEvent,
    CallCompleted,
    CallDelta,
    CallFailed,
    ProgramCompleted,
    ProgramCreated,
    ProgramFailed,
)
from macaw.timeline import Timeline
from macaw_server.bench.errors import BenchError, RefusedError
from macaw_server.bench.workload.records import Outcome, Run
from macaw_server.bench.workload.texts import Texts
from macaw_server.workloads import CallSpec, Output, ProgramSpec, Text

Way = Literal["requests", "programs"]
TIMEOUT_S = 1800.0
OVERLOADED = (429, 503)
"""What servers answer while they have a full queue."""
# What both ways ask for: the same number of tokens, the same tokens.
SAMPLING: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


class RoundTrip(httpx.AsyncHTTPTransport):
    """A network on which every request takes `seconds` longer, whatever it is."""

    def __init__(self, seconds: float) -> None:
        super().__init__(limits=httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=4.0))
        self.seconds = seconds
        self.num_requests = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send after the wait."""
        self.num_requests += 1
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return await super().handle_async_request(request)


class WorkloadClient:
    """Drives one server with applications; use it in an ``async with``.

    Args:
        url: Of the server, without ``/v1``.
        model: Name that it serves.
        api_key: Tenants share no cache, so a key that was not used before starts cold.
        way: How applications are sent.
        texts: Of the prompts.
        chat: Calls are chats of one message, or else completions.
        rtt_s: Round trip of every request.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None,
        way: Way,
        texts: Texts,
        *,
        chat: bool = True,
        rtt_s: float = 0.0,
    ) -> None:
        self._url, self._model, self._way, self._texts, self._chat = url, model, way, texts, chat
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(transport=RoundTrip(rtt_s), timeout=httpx.Timeout(TIMEOUT_S, connect=30))
        self._macaw = AsyncMacawClient(url, api_key, timeout_s=TIMEOUT_S, http_client=self._http)
        self._epoch_s = 0.0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._macaw.close()
        await self._http.aclose()

    async def run(self, programs: Sequence[ProgramSpec], *, timeline: bool = False) -> Run:
        """Send every program when it arrives, and wait for the last.

        Raises:
            BenchError: A request failed, or an answer does not have the length that was asked for.
        """
        self._begin(programs)
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._run_program(spec)) for spec in programs]
        except ExceptionGroup as e:
            raise _first(e) from None
        outcomes = [task.result() for task in running]
        picture = ""
        if timeline and self._way == "programs":
            slowest = max(outcomes, key=lambda outcome: outcome.latency_s)
            assert slowest.program_id is not None
            picture = Timeline(await self._macaw.get_program(slowest.program_id)).to_svg()
        return Run(outcomes, picture)

    def start(self, programs: Sequence[ProgramSpec]) -> list[asyncio.Task[Outcome]]:
        """Send every program when it arrives, each in a task of its own that the caller waits for or cancels.

        A task raises `BenchError`: `RefusedError` where the server's queue is full.
        """
        self._begin(programs)
        return [asyncio.create_task(self._run_program(spec)) for spec in programs]

    def _begin(self, programs: Sequence[ProgramSpec]) -> None:
        """Let the clock run; texts are made before, so that who comes first pays nothing for the others."""
        for part in {part for spec in programs for call in spec.calls for part in call.parts if isinstance(part, Text)}:
            self._texts[part]
        self._epoch_s = time.perf_counter()

    @property
    def now_s(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._epoch_s

    async def _run_program(self, spec: ProgramSpec) -> Outcome:
        await asyncio.sleep(spec.arrival_s)
        outcome = Outcome(spec, started_s=self.now_s)
        try:
            if self._way == "requests":
                await self._as_requests(outcome)
            else:
                await self._as_program(outcome)
        except (httpx.HTTPError, MacawError, BenchError, ExceptionGroup) as e:
            raise self._error(spec, e) from e
        outcome.ended_s = self.now_s
        expected = sum(call.output_len for call in spec.calls)
        if outcome.output_tokens != expected:
            raise BenchError(
                f"{self._url} wrote {outcome.output_tokens} tokens for program {spec.id} where {expected} were asked "
                "for: the sides would not do the same work. The server must know `ignore_eos`, and its context must "
                "hold the prompts (--scale makes them shorter)."
            )
        return outcome

    def _error(self, spec: ProgramSpec, error: BaseException) -> BenchError:
        """What is told of it: calls of a program run in groups, and an error of one is an error of its group."""
        if isinstance(error, BaseExceptionGroup):
            error = _first(error)
        if isinstance(error, BenchError):
            return error
        kind = RefusedError if isinstance(error, OverloadedError) else BenchError
        return kind(f"{self._url} failed on program {spec.id}: {type(error).__name__}: {error}")

    async def _as_requests(self, outcome: Outcome) -> None:
        """What an application does with an OpenAI client: it sends a call as soon as it has what goes into it."""
        spec = outcome.spec
        answers: dict[str, asyncio.Future[str]] = {call.id: asyncio.Future() for call in spec.calls}

        async def run(call: CallSpec) -> None:
            inputs = {dep: await answers[dep] for dep in call.deps}
            await asyncio.sleep(call.gap_s)
            prompt = "".join(inputs[p.call] if isinstance(p, Output) else p for p in self._parts(call))
            answers[call.id].set_result(await self._complete(call, prompt, outcome))

        async with asyncio.TaskGroup() as tasks:
            for call in spec.calls:
                tasks.create_task(run(call))
        outcome.answers = {target: answers[target].result() for target in spec.targets}

    def _parts(self, call: CallSpec) -> list[str | Output]:
        """The prompt, in order."""
        return [self._texts[part] if isinstance(part, Text) else part for part in call.parts]

    async def _complete(self, call: CallSpec, prompt: str, outcome: Outcome) -> str:
        """One streamed completion."""
        body = {
            "model": self._model,
            **({"messages": [{"role": "user", "content": prompt}]} if self._chat else {"prompt": prompt}),
            "max_tokens": call.output_len,
            "stream": True,
            "stream_options": {"include_usage": True},
            **SAMPLING,
        }
        outcome.num_requests += 1
        url = f"{self._url}/v1/{'chat/completions' if self._chat else 'completions'}"
        decoder, pieces = SSEDecoder(), list[str]()
        async with self._http.stream("POST", url, json=body, headers=self._headers) as response:
            if response.is_error:
                text = (await response.aread()).decode(errors="replace")
                kind = RefusedError if response.status_code in OVERLOADED else BenchError
                raise kind(f"{self._url} answered {response.status_code}: {text[:500]}")
            async for data in response.aiter_raw():
                for event in decoder.feed(data):
                    if event.data == "[DONE]":
                        continue
                    chunk = json.loads(event.data)
                    if "error" in chunk:
                        raise BenchError(f"{self._url} failed in mid-stream: {chunk['error']}")
                    if chunk.get("usage"):
                        outcome.add_usage(chunk["usage"])
                    for choice in chunk["choices"]:
                        if text := choice["delta"].get("content") if self._chat else choice["text"]:
                            self._on_text(outcome, call.id)
                            pieces.append(text)
        return "".join(pieces)

    def _on_text(self, outcome: Outcome, call_id: str) -> None:
        if not outcome.first_token_s and call_id in outcome.spec.targets:
            outcome.first_token_s = self.now_s

    async def _as_program(self, outcome: Outcome) -> None:
        """The whole graph in one piece; what a tool or a person has to come before is added when that is done."""
        spec = outcome.spec
        builder = ProgramBuilder(self._model)
        later = _later(spec, {call.id for call in spec.calls if call.gap_s})
        known = [call for call in spec.calls if call.id not in later]
        self._add(builder, spec, known)
        outcome.num_requests += 1
        stream = await self._macaw.stream_program(
            builder.build(open=bool(later), deltas="targets", metadata={"app": spec.app})
        )
        done: dict[str, asyncio.Event] = {call.id: asyncio.Event() for call in spec.calls}
        async with asyncio.TaskGroup() as tasks:
            growing = tasks.create_task(self._grow(outcome, builder, later, done)) if later else None
            async for event in stream:
                self._on_event(outcome, event, done)
            if growing is not None:
                await growing

    async def _grow(
        self, outcome: Outcome, builder: ProgramBuilder, later: dict[str, CallSpec], done: dict[str, asyncio.Event]
    ) -> None:
        """Add the calls behind each gap as soon as it is over."""
        spec, left = outcome.spec, dict(later)
        waiting = {call.id for call in spec.calls if call.gap_s}
        one_at_a_time = asyncio.Lock()  # growth may read what the growth before it has added

        async def pass_gap(gate: CallSpec) -> None:
            for dep in gate.deps:
                await done[dep].wait()
            await asyncio.sleep(gate.gap_s)
            async with one_at_a_time:
                waiting.discard(gate.id)
                held = _later(spec, waiting)
                ready = [left.pop(call_id) for call_id in list(left) if call_id not in held]
                self._add(builder, spec, ready)
                outcome.num_requests += 1
                assert outcome.program_id is not None
                await self._macaw.grow(outcome.program_id, builder.growth(close=not left))

        async with asyncio.TaskGroup() as tasks:
            for call in spec.calls:
                if call.gap_s:
                    tasks.create_task(pass_gap(call))

    def _add(self, builder: ProgramBuilder, spec: ProgramSpec, calls: Sequence[CallSpec]) -> None:
        for call in calls:
            ref = self._add_call(
                builder, call, [Ref(p.call) if isinstance(p, Output) else p for p in self._parts(call)]
            )
            if call.id in spec.targets:
                deadline = None if spec.deadline_s is None else 1000 * spec.deadline_s
                builder.target(ref, objective=spec.objective, deadline_ms=deadline)

    def _add_call(self, builder: ProgramBuilder, call: CallSpec, parts: list[str | Ref]) -> Ref:
        add = builder.chat if self._chat else builder.complete
        return add(*parts, name=call.id, max_tokens=call.output_len, **SAMPLING)

    def _on_event(self, outcome: Outcome, event: AnyEvent, done: dict[str, asyncio.Event]) -> None:
        match event:
            case ProgramCreated(program_id=program_id):
                outcome.program_id = program_id
            case CallDelta(call_id=call_id):
                self._on_text(outcome, call_id)
            case CallCompleted(call_id=call_id, completion=completion):
                outcome.add_usage(completion["usage"])
                done[call_id].set()
            case CallFailed(call_id=call_id, error=error):
                raise BenchError(f"{self._url} failed on call {call_id} of {outcome.spec.id}: {error.message}")
            case ProgramFailed(error=error):
                raise BenchError(f"{self._url} failed on program {outcome.spec.id}: {error.message}")
            case ProgramCompleted(variables=variables):
                outcome.answers = {target: variables[target] for target in outcome.spec.targets}


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error within groups of errors that is told."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _later(spec: ProgramSpec, gates: Collection[str]) -> dict[str, CallSpec]:
    """The calls in `gates`, for which the client is not ready, and all that come behind them."""
    later: dict[str, CallSpec] = {}
    for call in spec.calls:
        if call.id in gates or any(dep in later for dep in call.deps):
            later[call.id] = call
    return later
