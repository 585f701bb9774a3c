"""The state machine of one program: from a graph of calls to events, with no clock, no I/O and no engine.

The service drives it: it takes ready calls, reports what the engine did with them, and sends on the events
that every report gives back. `now_ms` is always the time since the program was created.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

from macaw.errors import CancelledError, InvalidProgramError, MacawError
from macaw.protocol import (
    AnyEvent,
    CallCompleted,
    CallDelta,
    CallFailed,
    CallStarted,
    Event,
    ProgramCompleted,
    ProgramCreated,
    ProgramFailed,
    ProgramGrowth,
    ProgramRequest,
    ProgramState,
    Target,
    Totals,
    Transform,
    VariableResolved,
)
from macaw_server.engine.types import CallClass, CallHints, Reuse

from .ahead import SENTINEL, partial_value
from .calls import Ahead, CallNode, Slack, error_body
from .dataflow import CallDoomed, CallReady, Dataflow, Effect, Failure, VariableSettled
from .graph import Graph
from .leads import Atom, Leads, answer_atoms, prompt_atoms
from .objectives import deduce, output_tokens

STEPS_TO_UNKNOWN = 3
"""Calls until a program that may grow goes on from an answer, if it does."""


class Program:
    """One application run.

    Every method that changes the program appends to `events` and returns what it appended. Reports about a
    call that is no longer running (its abort crossed them on the way) change nothing.

    Failure is a value: the output of a failed call is an error, its consumers fail with `upstream_failed` and
    the name of the root call, other branches go on. A program ends when all its targets have an outcome and
    it cannot grow any more; calls that are unfinished then fail with `cancelled`, and `aborted_calls` are
    those that run. An *open* program runs every call, because a later growth may need it; in a closed one a
    call that no target needs is refused.

    Args:
        program_id: Shown in events.
        request: The first part of the graph.
        plain: The program stands for a single OpenAI request. Its call may then say what a request says and a
            call inside a program does not: a prompt of token ids, `stream`, `stream_options`, `macaw`.

    Attributes:
        calls: Every call, in the order of arrival.
        status: `running` until the final event is out.
        error: Why the program failed.
        events: All of them; `sequence` is the index.
        aborted_calls: Set at the end: calls that the engine still works on, for nothing.

    Raises:
        InvalidProgramError: The graph is not sound; nothing has started.
    """

    def __init__(self, program_id: str, request: ProgramRequest, *, plain: bool = False) -> None:
        if not request.targets and not request.open:
            raise InvalidProgramError(
                "The program has no targets, so there is nothing to wait for. List the variables that you "
                'want in targets, or set "open": true and add targets later.',
                param="targets",
            )
        self.id = program_id
        self.request = request
        self.calls: dict[str, CallNode] = {}
        self.status: Literal["running", "completed", "failed"] = "running"
        self.error: MacawError | None = None
        self.events: list[AnyEvent] = []
        self.aborted_calls: list[str] = []
        self._plain = plain
        self._open = request.open
        self._graph = Graph()
        self._flow = Dataflow(self._graph)
        self._unsettled: set[str] = set()  # targets without an outcome
        self._ready: list[tuple[CallClass, int, str]] = []  # a heap
        self._running: dict[str, None] = {}
        self._leads = Leads()
        self._unfinished: dict[str, None] = {}  # calls, producers before consumers
        self._work_tokens = 0  # what these may answer
        self._ended_ms: float | None = None

        first = ProgramGrowth(
            variables=request.variables, calls=request.calls, transforms=request.transforms, targets=request.targets
        )
        new = self._graph.extend(first, closed=not request.open, plain=plain)
        self._emit(ProgramCreated(program_id=program_id))
        self._add(first, new, 0.0)

    @property
    def ended(self) -> bool:
        """Whether the final event is out."""
        return self.status != "running"

    # --------------------------------------------------------------------------------------------------------
    # What the client does

    def grow(self, growth: ProgramGrowth, now_ms: float) -> list[Event]:
        """Add a part of the graph: all of it, or nothing and an `InvalidProgramError`."""
        since = len(self.events)
        self._check_running("cannot grow")
        if not self._open:
            raise InvalidProgramError(
                f'Program {self.id!r} is closed and cannot grow. Post it with "open": true, and only the '
                'last growth with "close": true.'
            )
        new = self._graph.extend(growth, closed=growth.close, plain=self._plain)
        self._open = not growth.close
        self._add(growth, new, now_ms)
        return [*self.events[since:]]

    def set_variable(self, name: str, value: str, now_ms: float) -> list[Event]:
        """Give an external variable its value: once, though the same value again is fine.

        Raises:
            InvalidProgramError: `unknown_variable`, or `invalid_program` when it cannot be set (any more).
        """
        since = len(self.events)
        variable, param = self._graph.variables.get(name), f"variables.{name}"
        if name not in self._graph.producers:
            external = [n for n, v in self._graph.variables.items() if v.external]
            raise InvalidProgramError(
                f"Program {self.id!r} has no variable {name!r}. Its external variables: "
                f"{', '.join(map(repr, external)) or 'none'}.",
                code="unknown_variable",
                param=param,
            )
        if variable is None or not variable.external:
            producer = self._graph.producers[name]
            why = "it was declared with its value" if variable else f"{producer!r} produces it"
            raise InvalidProgramError(
                f'Variable {name!r} cannot be set: {why}. Only variables declared with "external": true can be.',
                param=param,
            )
        if self._flow.outcomes.get(name) == value:
            return []
        if name in self._flow.outcomes:
            raise InvalidProgramError(
                f"Variable {name!r} already has another value. A variable is set once: declare a new one for "
                "a new value.",
                param=param,
            )
        self._check_running(f"takes no value for {name!r}")
        self._apply(self._flow.settle(name, value), now_ms)
        return [*self.events[since:]]

    def cancel(self, error: MacawError, now_ms: float) -> list[Event]:
        """End the program: every unfinished call fails with `error`, and so does the program."""
        since = len(self.events)
        if not self.ended:
            self._end(error, now_ms, unfinished=error)
        return [*self.events[since:]]

    # --------------------------------------------------------------------------------------------------------
    # What the engine does

    def take_ready(self, now_ms: float) -> list[CallNode]:
        """Hand out calls whose inputs are all there, each once: strictest class first, then oldest."""
        limit = self.request.max_concurrency
        taken = []
        while self._ready and (limit is None or len(self._running) < limit):
            node = self.calls[heapq.heappop(self._ready)[2]]
            node.status = "running"
            self._leads.remove(node.call.id)
            self._running[node.call.id] = None
            taken.append(node)
        return taken

    def hints(self, node: CallNode, *, started_s: float, tenant: str, tenant_weight: float = 1.0) -> CallHints:
        """What the scheduler should know of a call that was handed out.

        Args:
            node: The call.
            started_s: When the program was created, on the scheduler's clock.
            tenant: Whose it is.
            tenant_weight: Above 0.
        """
        unknown = self._plain or self._open
        return CallHints(
            program_id=self.id,
            call_class=node.call_class,
            depth=node.depth,
            group=node.group,
            arrival_s=started_s + (node.timings.ready_ms or 0.0) / 1000,
            tenant=tenant,
            tenant_weight=tenant_weight,
            work_tokens=None if unknown else self._work_tokens,
            path_tokens=None if unknown else node.path_tokens,
            deadline_s=started_s + node.deadline_ms / 1000,
            may_return=self._plain,
        )

    def reuse(self, node: CallNode, num_tokens: int, length: Callable[[Atom], int]) -> tuple[Reuse, ...]:
        """What calls to come have in common with the prompt and the answer of one that was handed out.

        A program that may grow may need all of it; how soon nobody knows.

        Args:
            node: The call.
            num_tokens: Of its prompt.
            length: Of a part of the prompt, in whatever unit: tokens are counted by the share in the whole.
        """
        atoms = prompt_atoms(node.call)
        num_whole = len(atoms) + len(answer_atoms(node.call))
        found = []
        if leads := self._leads.of(node.call, node.depth):
            ends = list(itertools.accumulate(map(length, atoms)))
            for num_atoms, steps in leads:
                part = ends[min(num_atoms, len(atoms)) - 1] * num_tokens // max(1, ends[-1])
                found.append(Reuse(None if num_atoms == num_whole else part, steps))
        if self._open:
            found.append(Reuse(None, STEPS_TO_UNKNOWN))
        return tuple(found)

    def values(self, node: CallNode) -> dict[str, str]:
        """The values of the variables in the prompt of a call that was handed out."""
        return self._flow.values(self._graph.inputs[node.call.id])

    def next_calls(self, producers: Iterable[str] | None = None) -> list[CallNode]:
        """Calls that wait for nothing but answers that are being made, or for the client.

        Args:
            producers: Only those which wait for an answer of one of these calls.
        """
        if producers is None:
            names = list(self._unfinished)
        else:
            names = list(dict.fromkeys(name for id_ in producers for name in self._graph.calls_after(id_)))
        nodes = (self.calls[name] for name in names)
        return [
            node
            for node in nodes
            if node.status == "waiting"
            and all(self.calls[id_].status != "waiting" for id_ in self._graph.feeders_of(node.call.id))
        ]

    def known_inputs(self, node: CallNode, answer_so_far: Callable[[str], str]) -> tuple[dict[str, str], str | None]:
        """What is known of a waiting call's inputs, for warming the cache.

        Args:
            node: The call.
            answer_so_far: The text of a call that is at work.

        Returns:
            All inputs: values, or what is known of them with `SENTINEL` behind; and the call whose answer goes on
            with the first that has no value, if one is at work on it.
        """
        inputs, source = dict(self.values(node)), None
        missing = [name for name in node.call.inputs if name not in inputs]
        for name in missing:
            partial = partial_value(self._flow, name, answer_so_far)
            inputs[name] = partial.text + SENTINEL
            source = partial.source if name == missing[0] else source
        return inputs, source

    @property
    def targets(self) -> list[Target]:
        """What the application waits for."""
        return self._graph.targets

    def feeders_of(self, call_id: str) -> list[str]:
        """The calls whose answers a call reads, directly or through transforms."""
        return self._graph.feeders_of(call_id)

    def running_calls(self) -> list[str]:
        """Calls that were handed out and are not finished."""
        return list(self._running)

    def call_started(
        self, call_id: str, *, prompt_tokens: int, cached_tokens: int, now_ms: float, ahead: Ahead | None = None
    ) -> list[Event]:
        """The engine took the call into a batch; taking it up again after a preemption is no second start.

        `ahead` is what was prefilled before the call was ready.
        """
        node = self.calls[call_id]
        if call_id not in self._running or node.timings.started_ms is not None:
            return []
        assert node.timings.ready_ms is not None, f"call {call_id!r} runs and was never ready"
        node.timings.started_ms = now_ms
        node.prompt_tokens, node.cached_tokens = prompt_tokens, cached_tokens
        if ahead is not None:
            node.timings.ahead_ms = ahead.start_ms
            node.timings.prefilled_ahead_tokens = ahead.num_tokens
            node.timings.ahead_saved_ms = ahead.saved_ms
        started = CallStarted(
            call_id=call_id,
            queue_ms=now_ms - node.timings.ready_ms,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            prefilled_ahead_tokens=node.timings.prefilled_ahead_tokens,
        )
        return [self._emit(started)]

    def call_delta(self, call_id: str, chunk: dict[str, Any], now_ms: float) -> list[Event]:
        """A piece of the call's answer: an OpenAI (chat) completion chunk. An event where the client wants it."""
        node = self.calls[call_id]
        if call_id not in self._running:
            return []
        if node.timings.first_token_ms is None:
            node.timings.first_token_ms = now_ms
        wanted = self.request.deltas
        shown = wanted == "all" or (wanted == "targets" and node.call.output in self._graph.target_names)
        return [self._emit(CallDelta(call_id=call_id, chunk=chunk))] if shown else []

    def call_completed(self, call_id: str, completion: dict[str, Any], text: str, now_ms: float) -> list[Event]:
        """The call's whole answer, with usage: `text` resolves its output, and what waited for it goes on."""
        since = len(self.events)
        node = self.calls[call_id]
        if call_id not in self._running:
            return []
        del self._running[call_id]
        self._finish(node)
        node.status, node.completion = "completed", completion
        node.completion_tokens = completion["usage"]["completion_tokens"]
        node.timings.completed_ms = now_ms
        self._emit(CallCompleted(call_id=call_id, completion=completion, timings=node.timings.model_copy()))
        self._apply(self._flow.settle(node.call.output, text), now_ms)
        return [*self.events[since:]]

    def call_failed(self, call_id: str, error: MacawError, now_ms: float) -> list[Event]:
        """The call has no answer: its consumers, and theirs, fail with it."""
        since = len(self.events)
        node = self.calls[call_id]
        if call_id not in self._running:
            return []
        self._fail(node, error, now_ms)
        root = f"Call {call_id!r} failed with {error.code}: {error.message}"
        self._apply(self._flow.settle(node.call.output, Failure(error, root)), now_ms)
        return [*self.events[since:]]

    # --------------------------------------------------------------------------------------------------------
    # What others ask

    def slack(self, least_ms: Callable[[CallNode], float]) -> Slack | None:
        """How the target whose deadline leaves least time stands; None where no open target has a deadline.

        Args:
            least_ms: What an unfinished call takes at least, from now.
        """
        targets = [t for t in self._graph.targets if t.variable in self._unsettled and t.deadline_ms is not None]
        if self.ended or not targets:
            return None
        needed: dict[str, float] = {}
        for call_id in self._unfinished:
            before = max((needed.get(feeder, 0.0) for feeder in self._graph.feeders_of(call_id)), default=0.0)
            needed[call_id] = before + least_ms(self.calls[call_id])
        slacks = (
            Slack(t.deadline_ms, max((needed.get(id_, 0.0) for id_ in self._graph.feeders[t.variable]), default=0.0))
            for t in targets
            if t.deadline_ms is not None
        )
        return min(slacks, key=lambda slack: slack.deadline_ms - slack.needed_ms)

    def state(self, now_ms: float) -> ProgramState:
        """The whole state. Of the values that the client sent along only targets are repeated."""
        sent = {name for name, variable in self._graph.variables.items() if not variable.external}
        shown = self._targets() | {name: None for name in self._graph.producers if name not in sent}
        return ProgramState(
            id=self.id,
            status=self.status,
            model=self.request.model or "",
            calls=[node.state() for node in self.calls.values()],
            transforms=[step for step in self._graph.steps.values() if isinstance(step, Transform)],
            targets=self._graph.targets,
            variables=self._flow.values(shown),
            error=error_body(self.error) if self.error else None,
            critical_path=self._flow.critical_path(self._targets()) if self.status == "completed" else [],
            totals=self._totals(),
            duration_ms=now_ms if self._ended_ms is None else self._ended_ms,
            metadata=self.request.metadata,
        )

    # --------------------------------------------------------------------------------------------------------

    def _add(self, growth: ProgramGrowth, new: list[str], now_ms: float) -> None:
        """Bring a checked part to life; `new` are its steps, producers before consumers."""
        for call in growth.calls:
            self.calls[call.id] = CallNode(call, index=len(self.calls))
            self._work_tokens += output_tokens(call)
        self._unfinished |= {step_id: None for step_id in new if step_id in self.calls}
        for call_id, objective in deduce(self._graph, self._unfinished).items():
            node = self.calls[call_id]
            node.call_class, node.depth, node.group, node.path_tokens, node.deadline_ms = objective
        if not self._plain:
            for call in growth.calls:
                self._leads.add(call, self.calls[call.id].depth)
        self._ready = [self._heap_entry(call_id) for *_, call_id in self._ready]
        heapq.heapify(self._ready)
        effects = self._flow.add(growth.variables, new)
        self._unsettled |= {t.variable for t in growth.targets if t.variable not in self._flow.outcomes}
        self._apply(effects, now_ms)

    def _apply(self, effects: list[Effect], now_ms: float) -> None:
        """Follow up on new outcomes: events, ready calls, failed calls, and perhaps the end."""
        for effect in effects:
            match effect:
                case VariableSettled(name, outcome):
                    self._unsettled.discard(name)
                    if isinstance(outcome, str):
                        self._emit(VariableResolved(variable=name, value=outcome))
                case CallReady(call_id):
                    self.calls[call_id].status = "ready"
                    self.calls[call_id].timings.ready_ms = now_ms
                    heapq.heappush(self._ready, self._heap_entry(call_id))
                case CallDoomed(call_id, error):
                    self._fail(self.calls[call_id], error, now_ms)
        if self._unsettled or self._open or self.ended:
            return
        outcomes = (self._flow.outcomes[name] for name in self._targets())
        failure = next((outcome for outcome in outcomes if isinstance(outcome, Failure)), None)
        nobody = CancelledError("The program has ended: no target needs this call any more.")
        self._end(failure.error if failure else None, now_ms, unfinished=nobody)

    def _end(self, error: MacawError | None, now_ms: float, *, unfinished: MacawError) -> None:
        self.aborted_calls = self.running_calls()
        for call_id in list(self._unfinished):
            self._fail(self.calls[call_id], unfinished, now_ms)
        self._ready.clear()
        self._ended_ms = now_ms
        variables, totals = self._flow.values(self._targets()), self._totals()
        if error is None:
            self.status = "completed"
            self._emit(
                ProgramCompleted(
                    program_id=self.id,
                    variables=variables,
                    critical_path=self._flow.critical_path(self._targets()),
                    totals=totals,
                    duration_ms=now_ms,
                )
            )
        else:
            self.status, self.error = "failed", error
            self._emit(
                ProgramFailed(
                    program_id=self.id,
                    error=error_body(error),
                    variables=variables,
                    totals=totals,
                    duration_ms=now_ms,
                )
            )

    def _fail(self, node: CallNode, error: MacawError, now_ms: float) -> None:
        self._running.pop(node.call.id, None)
        self._finish(node)
        node.status, node.error = "failed", error
        node.timings.completed_ms = now_ms
        self._emit(CallFailed(call_id=node.call.id, error=error_body(error), timings=node.timings.model_copy()))

    def _finish(self, node: CallNode) -> None:
        del self._unfinished[node.call.id]
        self._leads.remove(node.call.id)
        self._work_tokens -= output_tokens(node.call)

    def _emit(self, event: AnyEvent) -> Event:
        event.sequence = len(self.events)
        self.events.append(event)
        return event

    def _check_running(self, what: str) -> None:
        if self.ended:
            raise InvalidProgramError(f"Program {self.id!r} has ended ({self.status}) and {what}. Post a new program.")

    def _heap_entry(self, call_id: str) -> tuple[CallClass, int, str]:
        return (node := self.calls[call_id]).call_class, node.index, call_id

    def _targets(self) -> dict[str, None]:
        return dict.fromkeys(target.variable for target in self._graph.targets)

    def _totals(self) -> Totals:
        nodes = self.calls.values()
        prompt, cached = sum(n.prompt_tokens for n in nodes), sum(n.cached_tokens for n in nodes)
        return Totals(
            calls=len(nodes),
            prompt_tokens=prompt,
            cached_tokens=cached,
            computed_tokens=prompt - cached,
            completion_tokens=sum(n.completion_tokens for n in nodes),
        )
