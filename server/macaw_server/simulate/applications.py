"""The clients and the server's program layer: from program specs to engine requests, and back. No clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, Protocol

from macaw.errors import ContextLengthError, DeadlineExceededError, MacawError
from macaw.protocol import (
    Call,
    CompletionRequest,
    ProgramGrowth,
    ProgramRequest,
    Target,
    TextPart,
    Transform,
    VariablePart,
)
from macaw_server.engine.types import EngineRequest, SamplingParams
from macaw_server.programs.calls import CallNode
from macaw_server.programs.leads import Atom
from macaw_server.programs.program import Program
from macaw_server.simulate.infinite_cache import InfiniteCache
from macaw_server.simulate.records import CallRecord, ProgramRecord
from macaw_server.simulate.tokens import TokenSource
from macaw_server.workloads import CallSpec, Output, ProgramSpec, Text


class Surroundings(Protocol):
    """What runs the requests, and the clock."""

    def submit(self, request: EngineRequest, now_s: float) -> None:
        """Queue a request; raises ValueError if it can never run."""
        ...

    def abort(self, request_id: str) -> None:
        """Forget a request; it may have ended."""
        ...

    def let_go(self, program_id: str) -> None:
        """Keep no pages for a program any more."""
        ...

    def call_at(self, time_s: float, action: Callable[[float], None]) -> None:
        """Call `action` with the time when it has come."""
        ...

    def on_end(self, record: ProgramRecord) -> None:
        """A program has ended."""
        ...


@dataclass(slots=True)
class _Run:
    """A program that is running.

    Attributes:
        record: What has happened.
        specs: All its calls.
        hidden: Those that the server does not know yet.
        timed: Those of `hidden` whose client step runs.
        programs: As the server has it; a client without programs has one for each call.
        created_s: When the server got each of them.
        outputs: Tokens of the answers.
        seen: Calls whose answers the client has.
    """

    record: ProgramRecord
    specs: dict[str, CallSpec]
    hidden: dict[str, CallSpec]
    timed: set[str] = field(default_factory=set)
    programs: dict[str, Program] = field(default_factory=dict)
    created_s: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)


class Applications:
    """Runs programs: knows which calls are ready, and what their prompts are.

    Args:
        tokens: Makes the texts.
        surroundings: See there.
        as_requests: The client knows no programs: it sends each call by itself when it has the answers before it.
        rtt_s: Round trip between client and server.
    """

    def __init__(
        self, tokens: TokenSource, surroundings: Surroundings, *, as_requests: bool = False, rtt_s: float = 0.0
    ) -> None:
        self._tokens = tokens
        self._surroundings = surroundings
        self._as_requests = as_requests
        self._half_rtt_s = rtt_s / 2
        self._runs: dict[str, _Run] = {}
        self._calls: dict[str, tuple[_Run, Program, CallNode]] = {}  # by request id
        self._infinite_cache = InfiniteCache()

    @property
    def num_live(self) -> int:
        """Programs that have not ended."""
        return len(self._runs)

    def arrive(self, spec: ProgramSpec, now_s: float) -> None:
        """A client starts an application."""
        specs = {call.id: call for call in spec.calls}
        run = _Run(ProgramRecord(spec), specs, dict(specs))
        self._runs[spec.id] = run
        self._reveal(run, now_s, first=True)

    # -- what the engine reports -----------------------------------------------------------------------------

    def started(self, request_id: str, cached_tokens: int, now_s: float) -> None:
        """A request entered a batch for the first time."""
        run, program, node = self._calls[request_id]
        record = run.record.calls[node.call.id]
        record.started_s, record.cached_tokens = now_s, cached_tokens
        program.call_started(
            node.call.id,
            prompt_tokens=record.prompt_len,
            cached_tokens=cached_tokens,
            now_ms=self._program_ms(run, program, now_s),
        )

    def first_token(self, request_id: str, now_s: float) -> None:
        """A request has its first token."""
        run, _, node = self._calls[request_id]
        run.record.calls[node.call.id].first_token_s = now_s

    def finished(self, request_id: str, output_ids: list[int], now_s: float) -> None:
        """A request has its last token."""
        run, program, node = self._calls.pop(request_id)
        call_id = node.call.id
        record = run.record.calls[call_id]
        record.ended_s, record.output_len = now_s, len(output_ids)
        run.outputs[call_id] = output_ids
        completion: dict[str, Any] = {"usage": {"completion_tokens": len(output_ids)}}
        program.call_completed(call_id, completion, call_id, self._program_ms(run, program, now_s))
        self._follow_up(run, program, now_s)
        if run.hidden:
            self._surroundings.call_at(now_s + self._half_rtt_s, partial(self._client_has, run, call_id))

    def failed(self, request_id: str, error: MacawError, now_s: float) -> None:
        """A request will get no answer."""
        run, program, node = self._calls.pop(request_id)
        program.call_failed(node.call.id, error, self._program_ms(run, program, now_s))
        self._follow_up(run, program, now_s)

    # -- the client ------------------------------------------------------------------------------------------

    def _client_has(self, run: _Run, call_id: str, now_s: float) -> None:
        run.seen.add(call_id)
        if run.record.spec.id in self._runs:
            self._reveal(run, now_s)

    def _reveal(self, run: _Run, now_s: float, *, first: bool = False) -> None:
        """Let the client do what it can do now: its own steps, and sending calls."""
        ready: list[CallSpec] = []
        for call in run.hidden.values():
            alone = self._as_requests or call.gap_s
            if call.id in run.timed or not (alone or first):
                continue
            if alone and run.seen.issuperset(call.deps):
                run.timed.add(call.id)
                if call.gap_s:
                    self._surroundings.call_at(now_s + call.gap_s, partial(self._send, run, (call,)))
                else:
                    ready.append(call)
        if ready or (first and not self._as_requests):
            self._send(run, ready, now_s)

    def _send(self, run: _Run, calls: Iterable[CallSpec], now_s: float) -> None:
        """Send calls, and those that wait for no client step but these."""
        calls = list(calls)
        for call in calls:
            del run.hidden[call.id]
        if not self._as_requests:
            for call in list(run.hidden.values()):  # producers come first
                if not call.gap_s and not run.hidden.keys() & set(call.deps):
                    calls.append(run.hidden.pop(call.id))
        action = partial(self._receive, run, calls, not run.hidden)
        if self._half_rtt_s:
            self._surroundings.call_at(now_s + self._half_rtt_s, action)
        else:
            action(now_s)

    # -- the server ------------------------------------------------------------------------------------------

    def _receive(self, run: _Run, calls: list[CallSpec], is_last: bool, now_s: float) -> None:
        """Take up what the client has sent; a part that has no call opens the program all the same."""
        spec = run.record.spec
        if spec.id not in self._runs:
            return
        if self._as_requests:
            for call in calls:
                self._create(run, f"{spec.id}/{call.id}", _alone(call.id, call.output_len), now_s)
            return
        sent = tuple(_sent(spec.id, call) for call in calls)
        part = _part(sent, spec.targets, spec.objective, spec.deadline_s, is_last)
        if spec.id in run.programs:
            program = run.programs[spec.id]
            program.grow(part.growth, self._program_ms(run, program, now_s))
            self._follow_up(run, program, now_s)
        else:
            self._create(run, spec.id, part.request, now_s)

    def _create(self, run: _Run, program_id: str, request: ProgramRequest, now_s: float) -> None:
        program = Program(program_id, request)
        run.programs[program_id], run.created_s[program_id] = program, now_s
        if (slack := program.slack(lambda _: 0.0)) is not None:
            self._surroundings.call_at(now_s + slack.deadline_ms / 1000, partial(self._on_deadline, run, program))
        self._follow_up(run, program, now_s)

    def _on_deadline(self, run: _Run, program: Program, now_s: float) -> None:
        if not program.ended:
            program.cancel(DeadlineExceededError("The deadline has passed."), self._program_ms(run, program, now_s))
            self._follow_up(run, program, now_s)

    def _follow_up(self, run: _Run, program: Program, now_s: float) -> None:
        """Submit what is ready; end what has ended."""
        if not program.ended:
            for node in program.take_ready(self._program_ms(run, program, now_s)):
                self._submit(run, program, node, now_s)
            return
        for call_id in program.aborted_calls:
            request_id = f"{run.record.spec.id}/{call_id}"
            if self._calls.pop(request_id, None) is not None:
                self._surroundings.abort(request_id)
        self._surroundings.let_go(program.id)
        if program.error is not None:
            run.record.error = program.error.code
        num_programs = len(run.specs) if self._as_requests else 1
        over = len(run.programs) == num_programs and all(program.ended for program in run.programs.values())
        if (over or run.record.error is not None) and self._runs.pop(run.record.spec.id, None) is not None:
            run.record.ended_s = now_s + self._half_rtt_s
            self._surroundings.on_end(run.record)

    def _submit(self, run: _Run, program: Program, node: CallNode, now_s: float) -> None:
        spec, call = run.record.spec, run.specs[node.call.id]
        prompt: list[int] = []
        for part in call.parts:
            prompt += self._tokens.text(part.key, part.length) if isinstance(part, Text) else run.outputs[part.call]
        hints = program.hints(
            node, started_s=run.created_s[program.id], tenant=spec.tenant, tenant_weight=spec.tenant_weight
        )
        if self._as_requests:
            hints = replace(hints, may_return=True)
        else:
            hints = replace(hints, reuse=program.reuse(node, len(prompt), partial(_length, spec.id, run.specs, call)))
        request = EngineRequest(
            f"{spec.id}/{call.id}",
            prompt,
            SamplingParams(max_tokens=call.output_len, temperature=0.0),
            salt=spec.tenant,
            hints=hints,
        )
        record = CallRecord(len(prompt), call.output_len, now_s)
        record.shared_tokens = self._infinite_cache.look_up(spec, run.specs, call)
        run.record.calls[call.id] = record
        self._calls[request.request_id] = run, program, node
        try:
            self._surroundings.submit(request, now_s)
        except ValueError as e:
            self.failed(request.request_id, ContextLengthError(str(e)), now_s)

    def _program_ms(self, run: _Run, program: Program, now_s: float) -> float:
        return (now_s - run.created_s[program.id]) * 1000


class _SentCall(NamedTuple):
    """A call as the client sends it: its parts are texts, by their keys within the program, and calls that it reads."""

    name: str
    parts: tuple[str | Output, ...]
    deps: tuple[str, ...]
    output_len: int


class _Part(NamedTuple):
    """What a client sends of a program, as the first part of it and as a later one."""

    request: ProgramRequest
    growth: ProgramGrowth


def _sent(program_id: str, call: CallSpec) -> _SentCall:
    parts = tuple(_key(program_id, part) if isinstance(part, Text) else part for part in call.parts)
    return _SentCall(call.id, parts, call.deps, call.output_len)


def _key(program_id: str, text: Text) -> str:
    """Equal for the same text of two programs of an app, such as the first chunk of their documents."""
    return text.key.removeprefix(f"{program_id}/")


def _length(program_id: str, specs: Mapping[str, CallSpec], call: CallSpec, atom: Atom) -> int:
    """Tokens of a part of a call's prompt."""
    if atom.kind == "text":
        texts = (part for part in call.parts if isinstance(part, Text))
        return next(text.length for text in texts if _key(program_id, text) == atom.value)
    return specs[atom.value].output_len if Output(atom.value) in call.parts else 0


# Programs of one app send the same over and over. Nobody changes what came over the wire, so they can share it.


@lru_cache(maxsize=1024)
def _alone(name: str, output_len: int) -> ProgramRequest:
    """A program of one call, which is one text, whatever it reads."""
    return ProgramRequest(calls=[_wire(_SentCall(name, (name,), (), output_len))], targets=[Target(variable=name)])


@lru_cache(maxsize=1024)
def _part(
    calls: tuple[_SentCall, ...],
    targets: tuple[str, ...],
    objective: Literal["latency", "throughput"],
    deadline_s: float | None,
    is_last: bool,
) -> _Part:
    """A part of a program. As long as more is to come, the client waits for what nobody in the part reads."""
    transforms: list[Transform] = []
    if is_last:
        names = list(targets)
        if len(names) > 1:
            transforms = [Transform(id="all-targets", op="join", inputs=names, output="all-targets")]
            names = ["all-targets"]
    else:
        read = {dep for call in calls for dep in call.deps}
        names = [call.name for call in calls if call.name not in read]
    deadline_ms = None if deadline_s is None else deadline_s * 1000
    growth = ProgramGrowth(
        calls=[_wire(call) for call in calls],
        transforms=transforms,
        targets=[Target(variable=name, objective=objective, deadline_ms=deadline_ms) for name in names],
        close=is_last,
    )
    request = ProgramRequest(calls=growth.calls, transforms=growth.transforms, targets=growth.targets, open=not is_last)
    return _Part(request, growth)


def _wire(call: _SentCall) -> Call:
    """A call on the wire; what it waits for without reading it stands at the end."""
    reads = [part.call if isinstance(part, Output) else None for part in call.parts]
    parts: list[TextPart | VariablePart] = [
        TextPart(text=part) if isinstance(part, str) else VariablePart(variable=part.call) for part in call.parts
    ]
    parts += [VariablePart(variable=dep) for dep in call.deps if dep not in reads]
    request = CompletionRequest(prompt=parts, max_tokens=call.output_len, ignore_eos=True)
    return Call(id=call.name, output=call.name, request=request)
