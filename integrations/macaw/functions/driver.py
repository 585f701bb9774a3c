"""Sends what a session has built, follows its program, and runs its client steps. All on one event loop."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from macaw.async_client import AsyncMacawClient, AsyncProgramStream
from macaw.builder import ProgramBuilder, Ref
from macaw.errors import (
    CancelledError,
    InternalServerError,
    InvalidProgramError,
    MacawError,
    NativeFunctionError,
    NotFoundError,
    OverloadedError,
    RequestError,
    UnknownModelError,
)
from macaw.functions.graph import Call, ClientStep, Graph, Node, resolved
from macaw.functions.variable import Objective, SemanticVariable, fail, located, settle
from macaw.protocol import AnyEvent, CallDelta, CallFailed, ProgramFailed, ProgramGrowth, VariableResolved

log = logging.getLogger(__name__)

LINGER_S = 60.0
"""A program that has had nothing to do for so long is closed; what is built later goes into a new one."""
END_TIMEOUT_S = 5.0
"""How long the end of a program may take to arrive, before its stream is broken off."""
GROW_RETRIES = 2
MAX_STEP_THREADS = 32
_CALL_INDEX = re.compile(r"calls\[(\d+)\]")


@dataclass(slots=True)
class LiveProgram:
    """A program on the server.

    Attributes:
        stream: Its events.
        pump: Follows them to the end.
        started_s: When it was accepted, on the monotonic clock; deadlines count from here.
        calls: Its calls, by id.
        coming: Calls of a growth that is not yet answered.
        declared: Variables that it knows.
        told: Its targets, with their objectives.
        error: Of calls that have no outcome when the stream has ended.
        busy: Something has happened since the last look.
    """

    stream: AsyncProgramStream
    pump: asyncio.Task[None] = field(init=False)
    started_s: float = field(default_factory=time.monotonic)
    calls: dict[str, Call] = field(default_factory=dict)
    coming: dict[str, Call] = field(default_factory=dict)
    declared: set[SemanticVariable] = field(default_factory=set)
    told: dict[SemanticVariable, Objective] = field(default_factory=dict)
    error: MacawError = field(default_factory=lambda: CancelledError("Its session has ended."))
    busy: bool = True

    @property
    def id(self) -> str:
        """The server's."""
        return self.stream.program_id

    @property
    def is_waited_for(self) -> bool:
        """Whether a call has no outcome yet."""
        return any(not call.output.ready for call in self.calls.values())

    def output(self, call_id: str) -> SemanticVariable | None:
        """What a call makes; None for one that the session does not know."""
        call = self.calls.get(call_id) or self.coming.get(call_id)
        return None if call is None else call.output

    def fail_unfinished(self) -> None:
        """Nothing more will come for what has no outcome."""
        for call in reversed(self.calls.values()):  # consumers first, so that each has the error itself
            if not call.output.ready:
                fail(call.output, located(call.output, self.error))


@dataclass(slots=True)
class Part:
    """A part of the graph, lowered: a program's beginning, or its growth.

    Attributes:
        builder: Has it in the protocol's types.
        calls: Its calls, by id, in the builder's order.
        declared: Variables that the server knows from it.
        externals: Those of them that the client has to set, with their names.
        told: Its targets, with their objectives.
        timed: Asks whose deadline it tells.
    """

    builder: ProgramBuilder
    calls: dict[str, Call] = field(default_factory=dict)
    declared: set[SemanticVariable] = field(default_factory=set)
    externals: list[tuple[str, SemanticVariable]] = field(default_factory=list)
    told: dict[SemanticVariable, Objective] = field(default_factory=dict)
    timed: list[SemanticVariable] = field(default_factory=list)


class Driver:
    """One session's work on an event loop; every method belongs there.

    Args:
        client: Closed with the driver.
        graph: What has been built.
        model: For calls without one of their own.
        options: Other fields of the program.
    """

    def __init__(self, client: AsyncMacawClient, graph: Graph, model: str | None, options: dict[str, Any]) -> None:
        self.program_id: str | None = None
        self._client = client
        self._graph = graph
        self._model = model
        self._options = options
        self._live: LiveProgram | None = None
        self._sending = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._threads = ThreadPoolExecutor(MAX_STEP_THREADS, thread_name_prefix="macaw-step")
        self._spawn(self._close_idle_programs())

    async def flush(self) -> None:
        """Send everything that was built or asked for since the last time, in one request."""
        self._keep(asyncio.current_task())
        async with self._sending:
            nodes = self._graph.take_unsent()
            for step in nodes:
                if isinstance(step, ClientStep):
                    self._spawn(self._run_step(step))
            calls = [node for node in nodes if isinstance(node, Call)]
            try:
                while (culprit := await self._send(calls)) is not None:
                    calls.remove(culprit)
            except asyncio.CancelledError:
                self._graph.put_back(calls)
                raise
            except Exception as error:
                if not isinstance(error, MacawError):
                    log.exception("sending a program")
                    error = InternalServerError(f"A bug in macaw: {error!r}.")
                for call in reversed(calls):
                    fail(call.output, located(call.output, error))

    async def close(self, *, cancel: bool) -> None:
        """End the program, and with it everything that has no value by now."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._live is not None:
            await self._end_program(self._live, cancel=cancel or self._live.is_waited_for)
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._client.close()

    async def _end_program(self, live: LiveProgram, *, cancel: bool) -> None:
        """Cancel or close a program, and follow it to its end. Where that fails, breaking the stream cancels it."""
        if not live.pump.done():
            try:
                if cancel:
                    await self._client.cancel(live.id)
                else:
                    await self._client.grow(live.id, ProgramBuilder().growth(close=True))
            except Exception as error:  # at the interpreter's end a connection may be refused by Python itself
                log.debug("program %s: %s", live.id, error)
                live.pump.cancel()
            _, pending = await asyncio.wait([live.pump], timeout=END_TIMEOUT_S)
            for pump in pending:
                pump.cancel()
            await asyncio.wait([live.pump])
        self._live = None

    # --------------------------------------------------------------------------------------------------------
    # Sending

    async def _send(self, calls: Sequence[Call]) -> Call | None:
        """Post or grow the program. Where the server refuses a single call, this one fails and is returned."""
        if self._live is not None and self._live.pump.done():
            self._live = None
        live = self._live
        calls = [call for call in calls if not call.output.ready]
        if live is None and calls:
            self._graph.forget_settled()
        part = self._lower(calls, live)
        if not part.calls and (live is None or not part.told):
            return None
        try:
            if live is None:
                stream = await self._client.stream_program(part.builder.build(open=True, **self._options))
                live = self._live = LiveProgram(stream)
                live.pump = asyncio.create_task(self._follow(live))
                self.program_id = live.id
            else:
                live.coming = part.calls  # their events may come before the answer
                await self._grow(live, part.builder.growth())
        except MacawError as error:
            if live is not None:
                live.coming = {}
            is_of_program = isinstance(error, InvalidProgramError | NotFoundError) and error.param is None
            if live is not None and is_of_program and await self._has_ended(live):
                return await self._send(calls)  # in a new program
            return _refused(error, list(part.calls.values()))
        log.debug("program %s: %d more calls, %d more targets", live.id, len(part.calls), len(part.told))
        self._note(live, part)
        return None

    async def _grow(self, live: LiveProgram, growth: ProgramGrowth) -> None:
        """Grow, and again where the server is full and says when to come back: it has taken nothing then."""
        for _ in range(GROW_RETRIES):
            try:
                await self._client.grow(live.id, growth)
                return
            except OverloadedError as error:
                if error.retry_after_s is None:
                    raise
                await asyncio.sleep(error.retry_after_s)
        await self._client.grow(live.id, growth)

    def _note(self, live: LiveProgram, part: Part) -> None:
        """The server has taken a part."""
        live.busy = True
        live.calls |= part.calls
        live.coming = {}
        if live.pump.done():
            live.fail_unfinished()
        live.declared |= part.declared
        live.told |= part.told
        self._graph.forget_deadlines(part.timed)
        for name, variable in part.externals:
            self._spawn(self._hand_over(live, name, variable))

    def _lower(self, calls: Sequence[Call], live: LiveProgram | None) -> Part:
        part = Part(ProgramBuilder(self._model if live is None else None))
        known = live.declared if live is not None else set()
        for call in calls:
            for variable in call.inputs:
                if variable not in known and variable not in part.declared:
                    self._declare(variable, part)
            name = self._graph.name(call.output)
            turns = [
                (role, [Ref(self._graph.name(p)) if isinstance(p, SemanticVariable) else p for p in text])
                for role, text in call.turns
            ]
            if turns[0][0]:
                messages = [{"role": role, "content": content} for role, content in turns]
                part.builder.call(messages, name=name, **call.options)
            else:
                part.builder.complete(*turns[0][1], name=name, **call.options)
            part.calls[name] = call
            part.declared.add(call.output)
        self._add_targets(part, live)
        return part

    def _declare(self, variable: SemanticVariable, part: Part) -> None:
        """Tell the server of a variable that no call of this program makes."""
        if variable.ready:
            part.builder.variable(self._graph.name(variable), value=variable.future.result())
        else:
            name = part.builder.external(self._graph.name(variable)).name
            part.externals.append((name, variable))
        part.declared.add(variable)

    def _add_targets(self, part: Part, live: LiveProgram | None) -> None:
        """What was asked for, and what no other call reads: that may be asked for yet, as the others were."""
        told = {} if live is None else live.told
        known = part.declared if live is None else part.declared | live.declared
        started_s = time.monotonic() if live is None else live.started_s
        asked_for: set[Objective] = set()
        for wanted, (objective, deadline_s) in self._graph.pending_asks():
            for variable in self._graph.calls_behind(wanted):
                if variable not in known:
                    continue
                asked_for.add(objective)
                if deadline_s is None and told.get(variable) in (objective, "latency"):
                    continue
                deadline_ms = None if deadline_s is None else max(1.0, (deadline_s - started_s) * 1000)
                part.builder.target(Ref(self._graph.name(variable)), objective=objective, deadline_ms=deadline_ms)
                part.told[variable] = objective
                part.timed.append(wanted)
        read = {variable for call in part.calls.values() for variable in call.inputs}
        others: Objective = "throughput" if asked_for == {"throughput"} else "latency"
        for call in part.calls.values():
            if call.output not in read and call.output not in part.told:
                part.builder.target(Ref(self._graph.name(call.output)), objective=others)
                part.told[call.output] = others

    async def _has_ended(self, live: LiveProgram) -> bool:
        """Whether a request was refused because the program is over; its stream is then read to the end."""
        try:
            if (await self._client.get_program(live.id)).status == "running":
                return False
        except NotFoundError:
            live.pump.cancel()
        await asyncio.wait([live.pump])
        return True

    # --------------------------------------------------------------------------------------------------------
    # Following

    async def _follow(self, live: LiveProgram) -> None:
        try:
            async for event in live.stream:
                live.busy = True
                _on_event(live, event)
        except MacawError as error:
            live.error = error
        except Exception as bug:
            log.exception("following program %s", live.id)
            live.error = InternalServerError(f"A bug in macaw: {bug!r}.")
        finally:
            live.fail_unfinished()
            await live.stream.close()

    async def _close_idle_programs(self) -> None:
        while True:
            await asyncio.sleep(LINGER_S)
            async with self._sending:
                if (live := self._live) is None:
                    continue
                if live.busy or live.is_waited_for:
                    live.busy = False
                else:
                    await self._end_program(live, cancel=False)

    # --------------------------------------------------------------------------------------------------------
    # Client steps

    async def _run_step(self, step: ClientStep) -> None:
        """Wait for a step's inputs, run it, and give its outputs their values."""
        try:
            for variable in step.inputs:
                await asyncio.wrap_future(variable.future)
        except MacawError:
            return  # which has failed the outputs too
        try:
            texts = step.native.texts(await self._result_of(step))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            for output in step.outputs:
                failed = NativeFunctionError(f"{output.label} failed. {type(error).__name__}: {error}")
                failed.__cause__ = error
                fail(output, failed)
        else:
            for output, text in zip(step.outputs, texts, strict=True):
                settle(output, text)

    async def _result_of(self, step: ClientStep) -> object:
        args, kwargs = map(resolved, (step.arguments.args, step.arguments.kwargs))
        run = partial(step.native.__wrapped__, *args, **kwargs)
        loop = asyncio.get_running_loop()
        if step.native.is_async:
            return await loop.create_task(run(), context=step.context)
        return await loop.run_in_executor(self._threads, step.context.run, run)

    async def _hand_over(self, live: LiveProgram, name: str, variable: SemanticVariable) -> None:
        """Give the server a client's variable when it has its value; what reads it has failed if it never does."""
        try:
            value = await asyncio.wrap_future(variable.future)
        except MacawError:
            return
        try:
            await self._client.set_variable(live.id, name, value)
        except MacawError as error:
            if not await self._has_ended(live):
                for call in live.calls.values():
                    if variable in call.inputs:
                        fail(call.output, located(call.output, error))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._keep(asyncio.create_task(work))

    def _keep(self, task: asyncio.Task[Any] | None) -> None:
        """To be cancelled when the session ends."""
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _on_event(live: LiveProgram, event: AnyEvent) -> None:
    match event:
        case CallDelta(call_id=name) if (output := live.output(name)) is not None:
            output.write(_new_text(event.chunk))
        case VariableResolved(variable=name) if (output := live.output(name)) is not None:
            settle(output, event.value)
        case CallFailed(call_id=name) if (output := live.output(name)) is not None:
            fail(output, located(output, event.error.to_exception()))
        case ProgramFailed():
            live.error = event.error.to_exception()


def cancel_unfinished(nodes: Sequence[Node]) -> None:
    """Fail what has no value when its session ends; consumers first, so that each has the error itself."""
    for node in reversed(nodes):
        for output in node.outputs:
            if not output.ready:
                fail(output, CancelledError(f"{output.label} was not finished when its session ended."))


def _refused(error: MacawError, calls: Sequence[Call]) -> Call:
    """The call that the server will not have, which fails; raises where the error is of no single one."""
    index = _CALL_INDEX.match(error.param or "")
    if index is None or int(index[1]) >= len(calls) or not isinstance(error, RequestError):
        raise error
    call = calls[int(index[1])]
    if isinstance(error, UnknownModelError) and "model" not in call.options:
        raise error
    fail(call.output, located(call.output, error))
    return call


def _new_text(chunk: dict[str, Any]) -> str:
    """The first choice's new text in an OpenAI (chat) completion chunk."""
    for choice in chunk["choices"]:
        if choice["index"] == 0:
            return str(choice["delta"].get("content") or "") if "delta" in choice else str(choice.get("text") or "")
    return ""
