"""A program that runs: its ready calls go to engines, their answers into it, its events to followers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from macaw.errors import CancelledError, DeadlineExceededError, InternalServerError, MacawError
from macaw.protocol import (
    AnyEvent,
    Call,
    CallCompleted,
    CallDelta,
    CallFailed,
    CallStarted,
    ChatCompletionRequest,
    Event,
    Hints,
    ProgramGrowth,
    ProgramState,
    VariableResolved,
)
from macaw_server.engine.types import CallClass, CallHints, Engine
from macaw_server.programs.calls import CallNode
from macaw_server.programs.leads import Atom
from macaw_server.programs.program import Program
from macaw_server.service.admission import Admission
from macaw_server.service.ahead import AheadService, ProgramAhead
from macaw_server.service.applications import application_id
from macaw_server.service.call_runner import CallRunner, abort_all
from macaw_server.service.completions import ResponseFormat
from macaw_server.service.metrics import Metrics
from macaw_server.service.pace import Pace
from macaw_server.service.prompts import Prepared, PromptPreparer
from macaw_server.service.traces import RunTrace, Traces
from macaw_server.service.types import ServiceConfig, Tenant

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the runs of one service share; `on_end` is called once for each."""

    config: ServiceConfig
    preparer: PromptPreparer
    metrics: Metrics
    ahead: AheadService
    admission: Admission
    pace: Pace
    traces: Traces
    on_end: Callable[[ProgramRun], None]


class ProgramRun:
    """One live or finished program. Belongs to the event loop; nothing here blocks it.

    Args:
        program: Not yet started; the run is the only one to change it.
        tenant: Whose it is.
        surroundings: The service's.
        prepared: Calls that are known to fit, by id.
        hints: What a client without a program says of its application; then `program` is a plain one.

    Attributes:
        started_s: Monotonic seconds; all times in the program count from here.
        values: Variables that have a value.
        hints: Of a plain program.
    """

    def __init__(
        self,
        program: Program,
        tenant: Tenant,
        surroundings: Surroundings,
        prepared: dict[str, Prepared],
        hints: Hints | None = None,
    ) -> None:
        self.program = program
        self.tenant = tenant
        self.started_s = time.monotonic()
        self.values: dict[str, str] = {}
        self._surroundings = surroundings
        self._prepared = prepared
        self.hints = hints
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._runners: dict[str, CallRunner] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: list[asyncio.TimerHandle] = []
        self._num_attached = 0
        self._keeping: set[Engine] = set()  # which may keep pages for calls to come
        self._trace = RunTrace(surroundings.traces, program, tenant, self.started_s, self.shown_id, hints)
        self._ahead: ProgramAhead | None = None
        if surroundings.config.prefill_ahead and not self.is_plain:
            answer_so_far = self._answer_so_far if surroundings.config.pipelining else None
            self._ahead = ProgramAhead(surroundings.ahead, program, tenant.salt, self.started_s, answer_so_far)

    @property
    def id(self) -> str:
        """The program's id."""
        return self.program.id

    @property
    def is_plain(self) -> bool:
        """Whether the program stands for an OpenAI request."""
        return self.hints is not None

    @property
    def shown_id(self) -> str:
        """The id under which a client finds it: that of its application, if it belongs to one."""
        app = None if self.hints is None else self.hints.app
        return self.id if app is None else application_id(self.tenant, app)

    @property
    def state(self) -> ProgramState:
        """The whole state now."""
        return self.program.state(self._now_ms())

    # --------------------------------------------------------------------------------------------------------
    # What the client does

    def start(self) -> None:
        """Begin with the calls that are ready."""
        self._apply(list(self.program.events))
        self._look_ahead()

    def grow(self, growth: ProgramGrowth, prepared: dict[str, Prepared]) -> None:
        """Add to the program. Raises `InvalidProgramError`, and then nothing has changed."""
        events = self.program.grow(growth, self._now_ms())
        self._prepared |= prepared
        if events:
            self._apply(events)
        else:
            self._advance()  # no event says so, but calls may be ready and deadlines new
        self._look_ahead()

    def set_variable(self, name: str, value: str) -> None:
        """Set an external variable. Raises `InvalidProgramError`."""
        self._apply(self.program.set_variable(name, value, self._now_ms()))

    def cancel(self, error: MacawError) -> None:
        """End the program and stop its calls; one that has ended stays as it is."""
        self._apply(self.program.cancel(error, self._now_ms()))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """As long as a client waits. When the last leaves, a program that is not detached is cancelled."""
        self._num_attached += 1
        try:
            yield
        finally:
            self._num_attached -= 1
            if self._num_attached == 0 and not self.program.request.detached:
                self.cancel(CancelledError("The client closed the connection, and the program was not detached."))

    async def events(self, after: int = -1) -> AsyncIterator[AnyEvent]:
        """The events with a sequence number over `after`, as they come, to the last."""
        position = after + 1
        while True:
            while position < len(self.program.events):
                yield self.program.events[position]
                position += 1
            if self.program.ended:
                return
            await self._changed.wait()

    async def wait(self) -> None:
        """Wait for the program's end."""
        while not self.program.ended:
            await self._changed.wait()

    # --------------------------------------------------------------------------------------------------------
    # What a CallRunner reports

    def call_started(self, call_id: str, *, prompt_ids: list[int], cached_tokens: int) -> None:
        """The engine took the call into a batch."""
        self._apply(
            self.program.call_started(
                call_id,
                prompt_tokens=len(prompt_ids),
                cached_tokens=cached_tokens,
                now_ms=self._now_ms(),
                ahead=None if self._ahead is None else self._ahead.started(call_id, prompt_ids, cached_tokens),
            )
        )
        self._trace.call_started(call_id, prompt_ids)

    def call_delta(self, call_id: str, chunk: dict[str, Any]) -> None:
        """A piece of the answer."""
        self._apply(self.program.call_delta(call_id, chunk, self._now_ms()))
        if self._ahead is not None:
            self._ahead.on_token(call_id)

    def call_completed(self, call_id: str, completion: dict[str, Any], text: str) -> None:
        """The whole answer."""
        self._apply(self.program.call_completed(call_id, completion, text, self._now_ms()))

    def call_failed(self, call_id: str, error: MacawError) -> None:
        """There will be no answer."""
        self._apply(self.program.call_failed(call_id, error, self._now_ms()))

    # --------------------------------------------------------------------------------------------------------

    def _apply(self, events: Sequence[Event]) -> None:
        """Follow up on what has happened, and wake everybody who waits for it."""
        if not events:
            return
        failed = []
        for event in events:
            self._surroundings.metrics.observe(event)
            match event:
                case VariableResolved(variable=name, value=value):
                    self.values[name] = value
                case CallStarted(call_id=call_id, queue_ms=queue_ms):
                    self._surroundings.pace.started(self.tenant.id, self.program.calls[call_id].call_class, queue_ms)
                case CallCompleted(call_id=call_id):
                    self._observe_prefill(self.program.calls[call_id])
                    self._surroundings.admission.end(self.tenant, weight(self.program.calls[call_id].call))
                    self._surroundings.pace.completed(event)
                    self._end_trace(call_id, self._runners.pop(call_id, None))
                case CallFailed(call_id=call_id):
                    self._surroundings.admission.end(self.tenant, weight(self.program.calls[call_id].call))
                    if (runner := self._runners.pop(call_id, None)) is not None:
                        failed.append(runner)
                        self._end_trace(call_id, runner)
        abort_all(failed)
        if any(isinstance(event, CallCompleted | CallFailed) for event in events):
            self._surroundings.ahead.on_end()
        if not all(isinstance(event, CallDelta) for event in events):
            self._advance()
            if self._ahead is not None:
                self._ahead.observe(events)
        self._changed.set()
        self._changed = asyncio.Event()

    def _advance(self) -> None:
        """Start what is ready; then the clock runs for the deadline, or for a client who is to come back."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if self.program.ended:
            if self._ahead is not None:
                self._ahead.close()
            self._prepared.clear()
            for engine in self._keeping:
                engine.let_go([self.id])
            self._surroundings.on_end(self)
            return
        taken = self.program.take_ready(self._now_ms())
        if self._ahead is not None and taken:
            self._ahead.begin([node.call.id for node in taken])
        for node in taken:
            task = self._loop.create_task(self._start_call(node))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._watch_deadline()
        if not self.program.running_calls():
            self._call_at(self._now_ms() + self._surroundings.config.idle_s * 1000, self._on_idle)

    def _look_ahead(self) -> None:
        if self._ahead is not None and not self.program.ended:
            self._ahead.begin()

    def _answer_so_far(self, call_id: str) -> str:
        runner = self._runners.get(call_id)
        return "" if runner is None else runner.text

    def _end_trace(self, call_id: str, runner: CallRunner | None) -> None:
        if runner is not None:
            self._trace.call_ended(call_id, runner.output_ids)

    def _observe_prefill(self, node: CallNode) -> None:
        t = node.timings
        if t.ready_ms is not None and t.first_token_ms is not None:
            num_computed = node.prompt_tokens - node.cached_tokens
            self._surroundings.ahead.observe_prefill(num_computed, t.first_token_ms - t.ready_ms)

    async def _start_call(self, node: CallNode) -> None:
        call, program = node.call, self.program
        try:
            prepared = self._prepared.pop(call.id, None)
            if prepared is None:
                values = program.values(node)
                prepared = await self._surroundings.preparer.prepare(call, values, program.request.model)
            if node.status != "running":
                return  # cancelled meanwhile
            self._runners[call.id] = self._runner(node, prepared)
            self._runners[call.id].start()
        except MacawError as e:
            self.call_failed(call.id, e)
        except Exception:
            log.exception("starting call %s of program %s", call.id, self.id)
            self.call_failed(
                call.id,
                InternalServerError("A bug in the server broke this call; its log has the traceback."),
            )

    def _runner(self, node: CallNode, prepared: Prepared) -> CallRunner:
        call = node.call
        return CallRunner(
            call.id,
            call.request,
            prepared,
            ResponseFormat.of_call(
                self.id,
                call.id,
                model=prepared.model.name,
                created=int(time.time()),
                chat=isinstance(call.request, ChatCompletionRequest),
            ),
            request_id=f"{self.id}/{call.id}",
            salt=self.tenant.salt,
            hints=self._call_hints(node, prepared),
            observer=self,
        )

    def _call_hints(self, node: CallNode, prepared: Prepared) -> CallHints:
        """What the graph says, or the client where there is none. Apps are told apart by tenant."""
        hints = self.program.hints(
            node, started_s=self.started_s, tenant=self.tenant.id, tenant_weight=self.tenant.weight
        )
        if self.hints is not None:
            return _overridden(hints, self.hints, self.tenant)
        values = self.program.values(node)

        def num_chars(atom: Atom) -> int:  # templates add a little to a role
            return len(values[atom.value] if atom.kind == "variable" else atom.value)

        reuse = self.program.reuse(node, len(prepared.prompt_ids), num_chars)
        if reuse:
            self._keeping.add(prepared.model.engine)
        return replace(hints, reuse=reuse)

    def least_ms(self, node: CallNode) -> float:
        """What is left of an unfinished call at least."""
        runner = self._runners.get(node.call.id)
        model = node.call.request.model or self.program.request.model or ""
        return self._surroundings.pace.call_ms(
            node.call.request,
            model,
            begun=node.status == "running",
            num_done=0 if runner is None else runner.num_tokens,
        )

    def _watch_deadline(self) -> None:
        """Look again when there is just time enough for what remains: whatever is done until then moves that on."""
        if (slack := self.program.slack(self.least_ms)) is not None:
            self._call_at(slack.deadline_ms - slack.needed_ms, self._on_slack_gone)

    def _on_slack_gone(self) -> None:
        slack = self.program.slack(self.least_ms)
        if slack is None:
            return
        deadline_ms, needed_ms = slack
        left_ms = deadline_ms - self._now_ms()
        if left_ms > max(0.0, needed_ms):
            self._watch_deadline()
            return
        if left_ms > 0:
            self.cancel(
                DeadlineExceededError(
                    f"The deadline of {deadline_ms:g} ms cannot be met: {left_ms:.1f} ms are left, and what remains "
                    f"takes at least {needed_ms:.1f} ms on an empty machine. Allow more time, or ask for less."
                )
            )
            return
        unfinished = ", ".join(self.program.running_calls()) or "none; a variable is not set"
        self.cancel(
            DeadlineExceededError(
                f"The deadline of {deadline_ms:g} ms has passed. Calls still running: {unfinished}. Allow "
                "more time, or ask for less."
            )
        )

    def _on_idle(self) -> None:
        idle_s = self._surroundings.config.idle_s
        self.cancel(
            DeadlineExceededError(
                f"The program waited {idle_s:g} s for its client to set a variable, to grow it or to close "
                "it. Come back sooner, or post it again."
            )
        )

    def _call_at(self, at_ms: float, callback: Callable[[], None]) -> None:
        self._timers.append(self._loop.call_later(max(0.0, at_ms - self._now_ms()) / 1000, callback))

    def _now_ms(self) -> float:
        return (time.monotonic() - self.started_s) * 1000


def weight(call: Call) -> int:
    """Sequences that an engine has to generate for a call."""
    return call.request.n or 1


def _overridden(deduced: CallHints, given: Hints, tenant: Tenant) -> CallHints:
    """A group hint makes a call part of a task group, unless the client says what it waits for."""
    in_group = given.group is not None and given.objective is None
    return replace(
        deduced,
        program_id=f"{tenant.id}/{given.app}" if given.app is not None else deduced.program_id,
        call_class=CallClass.GROUP if in_group else deduced.call_class,
        depth=deduced.depth if given.stage is None else given.stage,
        group=deduced.group if given.group is None else given.group,
    )
