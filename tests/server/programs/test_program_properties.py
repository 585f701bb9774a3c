"""Random programs, driven in random order, against a model that knows nothing but the rules."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from macaw.errors import CancelledError, InvalidProgramError
from macaw.protocol import Call, ProgramGrowth, Transform, Variable
from macaw_server.programs.program import Program
from macaw_server.programs.validation import inputs_of
from server.programs.builders import BoomError, call, completion, request, targets, transform


class ProgramMachine(RuleBasedStateMachine):
    """The model: which steps there are, and for each variable what is known of it."""

    @initialize(data=st.data(), limit=st.none() | st.integers(1, 3))
    def post(self, data: st.DataObject, limit: int | None) -> None:
        self.now_ms = 0.0
        self.steps: dict[str, Call | Transform] = {}
        self.given: dict[str, str] = {}
        self.external: set[str] = set()
        self.targets: list[str] = []
        self.values: dict[str, str] = {}  # variables that calls and the client have produced
        self.failed: set[str] = set()  # calls that were reported as failed
        self.cancelled = False
        self.taken: list[str] = []
        self.limit = limit
        self.is_open = True
        growth = self.draw_growth(data, close=False)
        self.accept(growth)
        steps = [*growth.calls, *growth.transforms]
        self.program = Program(
            "p",
            request(*steps, target=growth.targets, variables=growth.variables, open=True, max_concurrency=limit),
        )

    def draw_growth(self, data: st.DataObject, close: bool) -> ProgramGrowth:
        """A valid part: new variables, and steps in shuffled order that read old and new ones."""
        size = len(self.steps) + len(self.given) + len(self.external)
        given = {f"g{size}": Variable(value="v")} if data.draw(st.booleans()) else {}
        external = {f"x{size}": Variable(external=True)} if data.draw(st.booleans()) else {}
        known = [*self.variables(), *given, *external]
        calls, transforms = [], []
        for i in range(data.draw(st.integers(0, 4))):
            inputs = data.draw(st.lists(st.sampled_from(known), max_size=3)) if known else []
            if inputs and data.draw(st.integers(0, 3)) == 0:
                if data.draw(st.booleans()):
                    step = transform(f"t{size}.{i}", "join", *inputs)
                else:  # fails on an answer without a number
                    step = transform(f"t{size}.{i}", "regex", inputs[0], pattern="[0-9]+")
                transforms.append(step)
                known.append(step.output)
            else:
                calls.append(call(f"c{size}.{i}", *inputs))
                known.append(calls[-1].output)
        wanted = data.draw(st.lists(st.sampled_from(known), max_size=2)) if known else []
        if close:  # nothing may run for nothing
            wanted += [step.output for step in calls]
        calls = data.draw(st.permutations(calls))
        return ProgramGrowth(
            variables={**given, **external},
            calls=calls,
            transforms=data.draw(st.permutations(transforms)),
            targets=targets(*wanted),
            close=close,
        )

    def variables(self) -> list[str]:
        return [*self.given, *self.external, *(step.output for step in self.steps.values())]

    def accept(self, growth: ProgramGrowth) -> None:
        for name, variable in growth.variables.items():
            if variable.value is None:
                self.external.add(name)
            else:
                self.given[name] = self.values[name] = variable.value
        self.steps |= {step.id: step for step in (*growth.calls, *growth.transforms)}
        self.targets += [target.variable for target in growth.targets]
        self.is_open = not growth.close

    def outcomes(self) -> dict[str, str | None]:
        """Of every settled variable its value, or None where it failed: by brute force."""
        known: dict[str, str | None] = dict(self.values)
        known |= {self.steps[call_id].output: None for call_id in self.failed}
        changed = True
        while changed:
            changed = False
            for step in self.steps.values():
                names = inputs_of(step)
                if step.output in known:
                    continue
                if any(known.get(name, "") is None for name in names):
                    known[step.output] = None
                elif isinstance(step, Transform) and all(name in known for name in names):
                    text = "".join(str(known[name]) for name in step.inputs)
                    digits = re.search("[0-9]+", text)
                    known[step.output] = text if step.op == "join" else digits and digits[0]
                else:
                    continue
                changed = True
        return known

    def running(self) -> list[str]:
        return self.program.running_calls()

    @precondition(lambda self: self.is_open and not self.program.ended and len(self.steps) < 20)
    @rule(data=st.data(), close=st.sampled_from([False, False, True]))
    def grow(self, data: st.DataObject, close: bool) -> None:
        self.now_ms += 1
        growth = self.draw_growth(data, close)
        self.accept(growth)
        self.program.grow(growth, self.now_ms)

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def grow_wrongly(self, data: st.DataObject) -> None:
        before = self.program.state(0.0), len(self.program.events)
        used = data.draw(st.sampled_from(sorted(self.steps)))
        bad = data.draw(
            st.sampled_from(
                [
                    ProgramGrowth(calls=[call("new"), call(used)], close=True),
                    ProgramGrowth(calls=[call("new", "nowhere")]),
                    ProgramGrowth(calls=[call("new", "new2.out"), call("new2", "new.out")]),
                    ProgramGrowth(calls=[call("new")], variables={self.steps[used].output: Variable(value="x")}),
                ]
            )
        )
        with pytest.raises(InvalidProgramError):
            self.program.grow(bad, self.now_ms)
        assert (self.program.state(0.0), len(self.program.events)) == before

    @precondition(lambda self: self.external - self.values.keys() and not self.program.ended)
    @rule(data=st.data(), value=st.sampled_from(["", "a", "7"]))
    def set_variable(self, data: st.DataObject, value: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.external - self.values.keys())))
        self.values[name] = value
        self.program.set_variable(name, value, self.now_ms)
        assert self.program.set_variable(name, value, self.now_ms) == []
        with pytest.raises(InvalidProgramError):
            self.program.set_variable(name, value + "!", self.now_ms)

    @rule()
    def take(self) -> None:
        outcomes = self.outcomes()
        for node in self.program.take_ready(self.now_ms):
            assert node.call.id not in self.taken, "handed out twice"
            assert self.program.values(node) == {name: outcomes[name] for name in node.call.inputs}
            self.taken.append(node.call.id)

    @precondition(lambda self: self.running())
    @rule(data=st.data(), prompt=st.integers(1, 9))
    def start(self, data: st.DataObject, prompt: int) -> None:
        call_id = data.draw(st.sampled_from(self.running()))
        self.program.call_started(call_id, prompt_tokens=prompt, cached_tokens=prompt // 2, now_ms=self.now_ms)

    @precondition(lambda self: self.running())
    @rule(data=st.data(), text=st.sampled_from(["", "word", "42"]), num_tokens=st.integers(0, 5))
    def complete(self, data: st.DataObject, text: str, num_tokens: int) -> None:
        self.now_ms += 1
        call_id = data.draw(st.sampled_from(self.running()))
        self.values[self.steps[call_id].output] = text
        self.program.call_delta(call_id, {}, self.now_ms)
        self.program.call_completed(call_id, completion(text, num_tokens), text, self.now_ms)

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        call_id = data.draw(st.sampled_from(self.running()))
        self.failed.add(call_id)
        self.program.call_failed(call_id, BoomError("it broke"), self.now_ms)

    @precondition(lambda self: self.program.aborted_calls)
    @rule(data=st.data())
    def report_late(self, data: st.DataObject) -> None:
        call_id = data.draw(st.sampled_from(self.program.aborted_calls))
        assert self.program.call_delta(call_id, {}, self.now_ms) == []
        assert self.program.call_completed(call_id, completion("late"), "late", self.now_ms) == []

    @precondition(lambda self: not self.program.ended and len(self.program.events) > 12)
    @rule()
    def cancel(self) -> None:
        running = self.running()
        self.program.cancel(CancelledError("enough"), self.now_ms)
        self.cancelled = True
        assert self.program.aborted_calls == running

    @invariant()
    def the_log_is_gapless_and_ends_once(self) -> None:
        events: list[Any] = self.program.events
        assert [event.sequence for event in events] == list(range(len(events)))
        assert events[0].type == "program.created"
        final = [event for event in events if event.type in ("program.completed", "program.failed")]
        assert len(final) == self.program.ended
        assert not final or events[-1] is final[0]
        ends = [event.call_id for event in events if event.type in ("call.completed", "call.failed")]
        assert len(ends) == len(set(ends)), "a call ended twice"
        resolved = [event.variable for event in events if event.type == "variable.resolved"]
        assert len(resolved) == len(set(resolved))

    @invariant()
    def every_call_is_where_the_rules_put_it(self) -> None:
        outcomes = self.outcomes()
        for call_id, node in self.program.calls.items():
            inputs = [outcomes.get(name, "unknown") for name in node.call.inputs]
            if node.call.output in self.values:
                assert node.status == "completed"
            elif call_id in self.failed:
                assert (node.status, node.error.code) == ("failed", "boom")  # type: ignore[union-attr]
            elif None in inputs:
                assert node.status == "failed"
                if node.error.code == "upstream_failed":  # type: ignore[union-attr]
                    message = node.error.message  # type: ignore[union-attr]
                    roots = [f"Call {i!r} failed with boom: it broke" for i in self.failed]
                    assert message in roots or message.startswith("Transform 't")
                else:
                    assert self.program.ended
            elif self.program.ended:
                assert (node.status, node.error.code) == ("failed", "cancelled")  # type: ignore[union-attr]
            elif call_id in self.taken:
                assert node.status == "running"
            else:
                ready = all(name in outcomes for name in node.call.inputs)
                assert node.status == ("ready" if ready else "waiting")

    @invariant()
    def it_ends_exactly_when_all_targets_are_settled(self) -> None:
        outcomes = self.outcomes()
        settled = all(name in outcomes for name in self.targets)
        assert self.program.ended == (self.cancelled or (settled and not self.is_open))
        if self.program.ended and not self.cancelled:
            values = {name: outcomes[name] for name in self.targets}
            assert self.program.status == ("failed" if None in values.values() else "completed")
            resolved = {name: value for name, value in values.items() if value is not None}
            assert self.program.events[-1].variables == resolved  # type: ignore[union-attr]

    @invariant()
    def resolved_events_carry_what_was_produced(self) -> None:
        outcomes = self.outcomes()
        seen = {e.variable: e.value for e in self.program.events if e.type == "variable.resolved"}
        assert seen == {n: v for n, v in outcomes.items() if v is not None and n not in self.given}

    @invariant()
    def concurrency_and_totals_add_up(self) -> None:
        assert self.limit is None or len(self.running()) <= self.limit
        events: list[Any] = self.program.events
        started = [event for event in events if event.type == "call.started"]
        completed = [event for event in events if event.type == "call.completed"]
        totals = self.program.state(0.0).totals
        assert totals.calls == sum(isinstance(step, Call) for step in self.steps.values())
        assert totals.prompt_tokens == sum(event.prompt_tokens for event in started)
        assert totals.cached_tokens == sum(event.cached_tokens for event in started)
        assert totals.computed_tokens == totals.prompt_tokens - totals.cached_tokens
        usages = [event.completion["usage"]["completion_tokens"] for event in completed]
        assert totals.completion_tokens == sum(usages)

    def teardown(self) -> None:
        """Whatever has happened, a closed program with nothing left to wait for comes to its end."""
        if not hasattr(self, "program"):
            return
        if self.is_open and not self.program.ended:
            self.is_open = False
            self.program.grow(ProgramGrowth(close=True), self.now_ms)
        for name in sorted(self.external - self.values.keys()):
            if not self.program.ended:
                self.program.set_variable(name, "late", self.now_ms)
        while not self.program.ended and (nodes := [*self.program.take_ready(self.now_ms)] or self.running()):
            for node_or_id in nodes:
                call_id = node_or_id if isinstance(node_or_id, str) else node_or_id.call.id
                self.program.call_completed(call_id, completion("1"), "1", self.now_ms)
        assert self.program.ended


TestPrograms = ProgramMachine.TestCase
TestPrograms.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
