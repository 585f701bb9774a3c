"""Lowering: a chain and its input, read as the calls of a program.

Nothing of the chain's is executed but prompt templates. A Runnable that only moves values has a rule in
`langchain_macaw.rules`; everything else (functions, tools, retrievers, parsers that read the text) is a
client step: it runs natively, once, and reports what came out (`langchain_macaw.steps`). What needs a value
that is not known yet is lowered again as soon as it is.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from langchain_core.runnables import Runnable
from langchain_openai.chat_models.base import _convert_dict_to_message

from langchain_macaw.chat_models import ChatMacaw
from langchain_macaw.pending import FAILS, Pending, Rendered, may_be, rendered, unknowns
from langchain_macaw.plan import Part, PlannedCall
from langchain_macaw.registry import Scope as Scope
from langchain_macaw.registry import contains_model, rule_for
from langchain_macaw.sentinel import (
    ESCAPED_SUFFIX,
    OPAQUE,
    Answer,
    NotStatic,
    Opaque,
    RendersRepr,
    StandIns,
    Variable,
    _FutureMessage,
)
from langchain_macaw.templates import RequestTemplate
from macaw.protocol import Call, Target, Transform

logger = logging.getLogger(__name__)

_MAX_PATH_LEN = 200
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.:\-/\[\]]")


class _Expected(NamedTuple):
    """A client step that will run on `value`."""

    step: Runnable[Any, Any]
    pending: Pending
    value: Any
    scope: Scope


class Lowering:
    """Collects the calls of one run, in the order in which they become known. Not safe for threads.

    Args:
        streaming: The run streams, and models that stream do not read LangChain's cache.

    Attributes:
        model: The first planned call's model; the program goes to its server.
        stand_ins: Two sets, for `request_template`.
        results: What the run gives, as far as it is known; set by who lowers it.
    """

    def __init__(self, *, streaming: bool = False) -> None:
        self.streaming = streaming
        self.model: ChatMacaw | None = None
        self.stand_ins = (StandIns(6), StandIns(9))
        self.results: list[Any] = []
        self._num_calls = 0
        self._new: list[tuple[PlannedCall, Call]] = []
        self._escaped: set[str] = set()
        self._messages: dict[str, Mapping[str, Any]] = {}
        self._texts: dict[str, str] = {}
        self._open: set[Pending] = set()
        self._waiting: dict[Pending | Variable, list[Pending]] = defaultdict(list)
        self._expected: dict[int, list[_Expected]] = defaultdict(list)
        self._routed: dict[int, list[Any]] = defaultdict(list)

    @property
    def may_grow(self) -> bool:
        """Whether there may be more calls, as far as one can tell."""
        return bool(self._open)

    # -------------------------------------------------------------------------------------------------------
    # For rules

    def lower(self, runnable: Runnable[Any, Any], value: Any, scope: Scope) -> Any:
        """What `runnable` makes of `value`, as far as that is known without running it; adds its calls."""
        rule = rule_for(runnable)
        if rule is None or value is FAILS:
            return FAILS if value is FAILS else OPAQUE
        waits_for: set[Variable | Pending] = set()
        try:
            return rule.lower(self, runnable, value, scope)
        except RendersRepr as reason:
            warn_once(str(reason))
            self.refused(runnable, reason)
        except NotStatic as reason:
            self.refused(runnable, reason)
            waits_for = self._unknown_pendings(value) or self._unknown_texts(value)
            if not waits_for and any(isinstance(one, Variable) for one in unknowns(value)):
                return self.lower(runnable, self.known(value, texts=True), scope)
        except Exception as error:  # native execution meets the same, and there it is the user's to see
            self.refused(runnable, error)
            waits_for = self._unknown_pendings(value)
            if not rule.whole and not any(unknowns(value)):
                return FAILS
        if not waits_for:
            return FAILS if FAILS in unknowns(value) else OPAQUE
        texts = any(isinstance(one, Variable) for one in waits_for)
        return self._later(
            waits_for,
            lambda: self.lower(runnable, self.known(value, texts=texts), scope),
            may_call=contains_model(runnable),
        )

    def when(self, value: Any, proceed: Callable[[Any], Any], *, may_call: bool) -> Any:
        """`proceed(value)` once all of `value` is known, texts included."""
        if any(isinstance(one, Opaque) and not isinstance(one, Pending) for one in unknowns(value)):
            return FAILS if value is FAILS else OPAQUE
        waits_for = self._unknown_pendings(value) | self._unknown_texts(value)
        if not waits_for:
            return proceed(self.known(value, texts=True))
        retry = functools.partial(self._when_known, value, proceed, may_call)
        return self._later(waits_for, retry, may_call=may_call)

    def expect(self, step: Runnable[Any, Any], value: Any, scope: Scope, result: Any, *, routes: bool = False) -> Any:
        """Take `result` for the value of a client step; where it is not known, the step's report is waited for.

        Args:
            step: Will call `report` when it has run.
            value: What it will run on.
            scope: Where it is.
            result: What is known without running it.
            routes: It may return a chain, which runs in its place.
        """
        pending = result
        if not isinstance(result, Pending):
            if result is FAILS or all(isinstance(one, Pending | Variable) for one in unknowns(result)):
                return result
            pending = Pending(may_call=routes)
            if routes:
                self._open.add(pending)
        pending.reported = True
        self._expected[id(step)].append(_Expected(step, pending, value, scope))
        return pending

    def refused(self, runnable: Runnable[Any, Any], reason: Exception) -> None:
        """`runnable` could not be lowered as it is; `explain` tells the reason."""
        logger.info("%s could not be lowered: %r", runnable.get_name(), reason)

    def add_call(self, model: ChatMacaw, template: RequestTemplate, path: str) -> Any:
        """Plan one call; its answer.

        Raises:
            pydantic.ValidationError: The server would not take the request.
        """
        number = self._num_calls
        call_id, output = f"{_NOT_IN_NAMES.sub('_', path[-_MAX_PATH_LEN:]) or 'call'}-{number}", f"v{number}"
        call = Call(id=call_id, output=output, request=template.wire_request())
        self._num_calls += 1
        self._new.append((PlannedCall(call_id, output, template), call))
        self.model = self.model or model
        answer = Answer(Variable(output))
        if not template.body.get("tools"):
            return answer
        # Whether it is text or tool calls, only the message itself can tell.
        return self._later({answer.variable}, lambda: self.known(answer, texts=True), may_call=False)

    # -------------------------------------------------------------------------------------------------------
    # During the run

    def expects(self, step: Runnable[Any, Any]) -> bool:
        """Whether a report of this client step is waited for."""
        return bool(self._still_expected(step))

    def report(self, step: Runnable[Any, Any], value: Any, output: Any) -> None:
        """A client step ran on `value`, and `output` came out.

        What was routed is planned already: its output must not be taken for that of another run of the step.
        """
        routed = self._routed[id(step)]
        for i, one in enumerate(routed):
            if may_be(one, value, {}):
                del routed[i]
                return
        if expected := self._match(step, value):
            self._settle(self._resolve(expected.pending, output))

    def route(self, step: Runnable[Any, Any], value: Any, runnable: Runnable[Any, Any]) -> None:
        """A client step's function returned `runnable`, which will now run on `value` in its place."""
        self._routed[id(step)].append(value)
        if expected := self._match(step, value):
            self._settle(self._resolve(expected.pending, self.lower(runnable, value, expected.scope)))

    def answered(self, variable: str, message: Mapping[str, Any]) -> None:
        """A call has its answer: an OpenAI message."""
        self._messages[variable], self._texts[variable] = message, message["content"] or ""
        self._settle([Variable(variable)])

    def known(self, value: Any, *, texts: bool = False) -> Any:
        """`value` with what is known by now in its place; texts of variables only if asked for."""
        match value:
            case Pending(known=True):
                return self.known(value.value, texts=texts)
            case Variable(name) if texts:
                return self._texts.get(name, value)
            case Answer(Variable(name)) if texts and name in self._messages:
                message = _convert_dict_to_message(self._messages[name])
                return _FutureMessage(**{key: getattr(message, key) for key in ("content", "tool_calls")})
            case Rendered(_, render, inner):
                return rendered(render, self.known(inner, texts=texts))
            case dict():
                return {key: self.known(item, texts=texts) for key, item in value.items()}
            case list():
                return [self.known(item, texts=texts) for item in value]
            case tuple() if type(value) is tuple:
                return tuple(self.known(item, texts=texts) for item in value)
        return value

    def drain(self) -> Part | None:
        """The calls that have become known since the last time; None if there are none.

        Targets are the answers in the results, those that client steps wait for, and those that no other call reads.
        """
        if not self._new:
            return None
        planned, calls = [call for call, _ in self._new], [call for _, call in self._new]
        self._new = []
        read = dict.fromkeys(name for call in planned for name in sorted(call.template.variables))
        escaped = [name for name in read if name.endswith(ESCAPED_SUFFIX) and name not in self._escaped]
        self._escaped.update(escaped)
        waited_for = [
            self.results,
            [one.value for every in self._expected.values() for one in every if not one.pending.known],
        ]
        outer = {one.name for one in unknowns(self.known(waited_for)) if isinstance(one, Variable)}
        inner = {name.removesuffix(ESCAPED_SUFFIX) for name in read} - outer
        transforms = [
            Transform(id=name, op="html_escape", inputs=[name.removesuffix(ESCAPED_SUFFIX)], output=name)
            for name in escaped
        ]
        return Part(
            planned, calls, transforms, [Target(variable=call.output) for call in calls if call.output not in inner]
        )

    # -------------------------------------------------------------------------------------------------------
    # Waiting

    def _later(self, waits_for: Iterable[Variable | Pending], retry: Callable[[], Any], *, may_call: bool) -> Pending:
        pending = Pending(may_call=may_call)
        if may_call:
            self._open.add(pending)
        self._wait(pending, waits_for, retry)
        return pending

    def _wait(self, pending: Pending, waits_for: Iterable[Variable | Pending], retry: Callable[[], Any]) -> None:
        pending.retry = retry
        for one in waits_for:
            pending.num_missing += 1
            self._waiting[one].append(pending)

    def _when_known(self, value: Any, proceed: Callable[[Any], Any], may_call: bool) -> Any:
        return self.when(self.known(value, texts=True), proceed, may_call=may_call)

    def _resolve(self, pending: Pending, value: Any) -> list[Variable | Pending]:
        """`pending` is `value`: which may itself be waited for, or never be known. What is known by that."""
        if pending.known:
            return []
        value = self.known(value)
        self._open.discard(pending)
        if isinstance(value, Pending):
            self._wait(pending, [value], lambda: self.known(value))
            return []
        if value is OPAQUE and pending.reported:  # but a report may still tell
            return []
        pending.known, pending.value = True, value
        return [pending]

    def _settle(self, known: list[Variable | Pending]) -> None:
        ready = deque(known)
        while ready:
            for pending in self._waiting.pop(ready.popleft(), ()):
                pending.num_missing -= 1
                if not pending.num_missing and not pending.known and pending.retry:
                    ready += self._resolve(pending, self._retried(pending.retry))

    def _retried(self, retry: Callable[[], Any]) -> Any:
        """What a retry gives; one that fails must not stop the planning of other inputs."""
        try:
            return retry()
        except Exception as error:
            logger.info("A value could not be lowered when it was known: %r", error)
            return FAILS

    def _match(self, step: Runnable[Any, Any], value: Any) -> _Expected | None:
        """Which run of a step that was; runs on equal values are as good as each other.

        What can still be planned itself is not meant as long as its value is unknown: it was another run, one that has
        been planned.
        """
        expected = self._still_expected(step)
        possible = (one for one in expected if not (one.pending.retry and self._unknown_pendings(one.value)))
        found = next((one for one in possible if may_be(one.value, value, self._texts)), None)
        if found:
            expected.remove(found)
        return found

    def _still_expected(self, step: Runnable[Any, Any]) -> list[_Expected]:
        expected = self._expected[id(step)] = [one for one in self._expected[id(step)] if not one.pending.known]
        return expected

    def _unknown_pendings(self, value: Any) -> set[Variable | Pending]:
        return {one for one in unknowns(self.known(value)) if isinstance(one, Pending)}

    def _unknown_texts(self, value: Any) -> set[Variable | Pending]:
        unknown = unknowns(self.known(value))
        return {one for one in unknown if isinstance(one, Variable) and one.name not in self._texts}


@functools.lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Log a warning that each run would repeat."""
    logger.warning(message)
