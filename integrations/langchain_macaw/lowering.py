"""Lowering: a chain and its input, read as the calls of a program.

Nothing of the chain's is executed but prompt templates. A Runnable that only moves values has a rule in
`langchain_macaw.rules`; everything else (functions, tools, retrievers, parsers that read the text) is a
client step: its value is `OPAQUE`, it runs natively and once, and what needs its value is asked for by
ordinary requests.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.runnables import Runnable

from langchain_macaw.chat_models import ChatMacaw
from langchain_macaw.plan import Plan, PlannedCall
from langchain_macaw.sentinel import (
    ESCAPED_SUFFIX,
    OPAQUE,
    Answer,
    NotStatic,
    RendersRepr,
    StandIns,
    Variable,
)
from langchain_macaw.templates import RequestTemplate
from macaw.protocol import Call, ProgramRequest, Target, Transform

logger = logging.getLogger(__name__)

_MAX_PATH_LEN = 200
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.:\-/\[\]]")


@dataclass(frozen=True, slots=True)
class Scope:
    """What a Runnable gets besides its input.

    Attributes:
        path: Where in the chain it is; becomes part of its calls' ids.
        kwargs: Arguments bound to it.
        configurable: `configurable` of its config.
    """

    path: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    configurable: Mapping[str, Any] = field(default_factory=dict)

    def at(self, step: str = "") -> Scope:
        """The scope of a part of this Runnable, which gets none of its arguments."""
        return Scope(self.path + step, {}, self.configurable)


class Lowering:
    """Collects the calls of one run.

    Args:
        streaming: The run streams, and models that stream do not read LangChain's cache.

    Attributes:
        model: The first planned call's model; the program goes to its server.
        stand_ins: Two sets, for `request_template`.
    """

    def __init__(self, *, streaming: bool = False) -> None:
        self.streaming = streaming
        self.model: ChatMacaw | None = None
        self.stand_ins = (StandIns(6), StandIns(9))
        self._planned: list[PlannedCall] = []
        self._calls: list[Call] = []

    def lower(self, runnable: Runnable[Any, Any], value: Any, scope: Scope) -> Any:
        """What `runnable` makes of `value`, as far as that is known without running it; adds its calls."""
        rule = _rule_for(type(runnable))
        if rule is None:
            return OPAQUE
        try:
            return rule(self, runnable, value, scope)
        except RendersRepr as reason:
            warn_once(str(reason))
        except NotStatic as reason:
            logger.info("%s is left to native execution: %s", runnable.get_name(), reason)
        except Exception as error:  # native execution meets the same, and there it is the user's to see
            logger.debug("%s could not be lowered: %r", runnable.get_name(), error)
        return OPAQUE

    def add_call(self, model: ChatMacaw, template: RequestTemplate, path: str) -> Answer:
        """Plan one call; its answer.

        Raises:
            pydantic.ValidationError: The server would not take the request.
        """
        number = len(self._calls)
        call_id, output = f"{_NOT_IN_NAMES.sub('_', path[-_MAX_PATH_LEN:]) or 'call'}-{number}", f"v{number}"
        self._calls.append(Call(id=call_id, output=output, request=template.wire_request()))
        self._planned.append(PlannedCall(call_id, output, template))
        self.model = self.model or model
        return Answer(Variable(output))

    def plan(self, results: Sequence[Any], *, max_concurrency: int | None, metadata: dict[str, str]) -> Plan | None:
        """The program that was collected; None if no call is known ahead.

        Args:
            results: What `lower` gave for each input. The program's targets are the answers in there, and those
                that no other call reads: client steps wait for them.
            max_concurrency: LangChain's limit on calls at the same time.
            metadata: Labels for the program.
        """
        if not self._calls:
            return None
        consumed = dict.fromkeys(name for call in self._planned for name in sorted(call.template.variables))
        escaped = [name for name in consumed if name.endswith(ESCAPED_SUFFIX)]
        inner = {name.removesuffix(ESCAPED_SUFFIX) for name in consumed} - set(_variables(results))
        request = ProgramRequest(
            calls=self._calls,
            transforms=[
                Transform(id=name, op="html_escape", inputs=[name.removesuffix(ESCAPED_SUFFIX)], output=name)
                for name in escaped
            ],
            targets=[Target(variable=call.output) for call in self._calls if call.output not in inner],
            stream=True,
            max_concurrency=max_concurrency,
            metadata=metadata,
        )
        return Plan(request, self._planned)


@functools.lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Log a warning that each run would repeat."""
    logger.warning(message)


Rule = Callable[[Lowering, Any, Any, Scope], Any]
_RULES: dict[type[Any], Rule] = {}


def rule(*kinds: type[Any]) -> Callable[[Rule], Rule]:
    """Register how Runnables of these kinds, and of subclasses that leave `invoke` as it is, are lowered."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


@functools.cache
def _rule_for(kind: type[Runnable[Any, Any]]) -> Rule | None:
    base = next((base for base in kind.__mro__ if base in _RULES), None)
    return _RULES[base] if base is not None and kind.invoke is base.invoke else None


def _variables(value: Any) -> Iterator[str]:
    """Names of the variables in a lowered value."""
    match value:
        case Variable(name) | Answer(Variable(name)):
            yield name
        case dict():
            yield from _variables(list(value.values()))
        case list() | tuple():
            for item in value:
                yield from _variables(item)
