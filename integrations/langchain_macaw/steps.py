"""Client steps: what a chain runs between its calls, watched so that planning can go on behind it.

`watched` copies what a chain is composed of; its leaves stay the same objects. A leaf whose value only native
execution knows is put into a `ClientStep`, which runs it as it would have run, and reports to the current plan.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, cast

from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.utils import Input, Output

from langchain_macaw.plan import CURRENT_PLAN
from langchain_macaw.registry import contains_model, rule, rule_for


def watched(runnable: Runnable[Any, Any]) -> Runnable[Any, Any]:
    """A copy of a chain which runs as the chain does, and reports what its client steps give."""
    rule = rule_for(runnable)
    if rule is None:
        return _client_step(runnable)
    if rule.whole:
        return ClientStep(bound=runnable)
    if rule.transparent:
        return watched(getattr(runnable, rule.parts[0]))
    if not rule.parts:
        return runnable
    copied: Any = copy.copy(runnable)
    for name in rule.parts:
        copied.__dict__[name] = _map_runnables(getattr(runnable, name))
    return cast("Runnable[Any, Any]", copied)


class ClientStep(RunnableBindingBase[Input, Output]):  # type: ignore[no-redef]  # a field named kwargs
    """`bound`, run as it is, by every entry point that a chain uses for its steps.

    Attributes:
        routes: It is a function which may return a chain, to run in its place.
    """

    routes: bool = False

    def invoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """As `bound.invoke`."""
        output = self.bound.invoke(input, config, **kwargs)
        self._report([(input, output)])
        return output

    async def ainvoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """As `bound.ainvoke`."""
        output = await self.bound.ainvoke(input, config, **kwargs)
        self._report([(input, output)])
        return output

    def batch(
        self,
        inputs: list[Input],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Output]:
        """As `bound.batch`; the plan takes in all outputs at once."""
        outputs = self.bound.batch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        self._report(zip(inputs, outputs, strict=True))
        return outputs

    async def abatch(
        self,
        inputs: list[Input],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Output]:
        """As `bound.abatch`; the plan takes in all outputs at once."""
        outputs = await self.bound.abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)
        self._report(zip(inputs, outputs, strict=True))
        return outputs

    def stream(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Output]:
        """As `bound.stream`."""
        return self._watch([input], self.bound.stream(input, config, **kwargs))

    def astream(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Output]:
        """As `bound.astream`."""
        return self._awatch([input], self.bound.astream(input, config, **kwargs))

    def transform(
        self, input: Iterator[Input], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Output]:
        """As `bound.transform`."""
        chunks: list[Input] = []
        return self._watch(chunks, self.bound.transform(noting(input, chunks), config, **kwargs))

    def atransform(
        self, input: AsyncIterator[Input], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Output]:
        """As `bound.atransform`."""
        chunks: list[Input] = []
        return self._awatch(chunks, self.bound.atransform(anoting(input, chunks), config, **kwargs))

    def _watch(self, inputs: list[Input], outputs: Iterator[Output]) -> Iterator[Output]:
        chunks: list[Output] = []
        yield from noting(outputs, chunks)
        self._report_sums(inputs, chunks)

    async def _awatch(self, inputs: list[Input], outputs: AsyncIterator[Output]) -> AsyncIterator[Output]:
        chunks: list[Output] = []
        async with aclosing(anoting(outputs, chunks)) as items:
            async for item in items:
                yield item
        self._report_sums(inputs, chunks)

    def _report_sums(self, inputs: list[Input], outputs: list[Output]) -> None:
        plan = CURRENT_PLAN.get()
        if plan and plan.expects(self):  # adding up takes its time
            self._report(zip(added_up(inputs), added_up(outputs), strict=False))

    def _report(self, runs: Iterable[tuple[Any, Any]]) -> None:
        if plan := CURRENT_PLAN.get():
            plan.report(self, runs)


@rule(ClientStep, parts=("bound",))
def _step(lowering: Any, step: ClientStep[Any, Any], value: Any, scope: Any) -> Any:
    """What can be known without running it, else what it will report."""
    result = lowering.lower(step.bound, value, scope)
    return lowering.expect(step, value, scope, result, routes=step.routes)


def noting(items: Iterator[Any], seen: list[Any], then: Callable[[], object] = lambda: None) -> Iterator[Any]:
    """`items`, which are also put into `seen`; `then` comes when there are no more."""
    try:
        for item in items:
            seen.append(item)
            yield item
        then()
    finally:
        getattr(items, "close", lambda: None)()


async def anoting(
    items: AsyncIterator[Any], seen: list[Any], then: Callable[[], object] = lambda: None
) -> AsyncGenerator[Any]:
    """As `noting`."""
    try:
        async for item in items:
            seen.append(item)
            yield item
        then()
    finally:
        if hasattr(items, "aclose"):
            await items.aclose()


def added_up(chunks: Sequence[Any]) -> list[Any]:
    """The value that chunks make up, as `Runnable.transform` adds them; nothing for no chunks."""
    total: list[Any] = []
    for chunk in chunks:
        try:
            total = [total[0] + chunk] if total else [chunk]
        except TypeError:
            total = [chunk]
    return total


# -----------------------------------------------------------------------------------------------------------
# Functions that return chains


def _client_step(runnable: Runnable[Any, Any]) -> ClientStep[Any, Any]:
    if not isinstance(runnable, RunnableLambda) or not _returns_chains(runnable):
        return ClientStep(bound=runnable)
    function = copy.copy(runnable)
    step: ClientStep[Any, Any] = ClientStep(bound=function, routes=True)
    for name in ("func", "afunc"):
        if hasattr(runnable, name):
            setattr(function, name, _routing(step, getattr(runnable, name)))
    return step


def _returns_chains(step: RunnableLambda[Any, Any]) -> bool:
    """Whether its function refers to a chain that it does not itself run. A wrong guess costs a request."""
    if not any(map(contains_model, step.deps)):
        return False
    functions = [getattr(step, name, None) for name in ("func", "afunc")]
    names = {name for function in functions for name in getattr(getattr(function, "__code__", None), "co_names", ())}
    return not names & {"invoke", "ainvoke", "stream", "astream", "batch", "abatch"}


def _routing(step: ClientStep[Any, Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose returned chains become part of the plan."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return function

    def route(value: Any, output: Any) -> Any:
        plan = CURRENT_PLAN.get()
        if plan is None or not isinstance(output, Runnable):
            return output
        output = watched(output)
        plan.route(step, value, output)
        return output

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def arouted(value: Any, *args: Any, **kwargs: Any) -> Any:
            return route(value, await function(value, *args, **kwargs))

        return arouted

    @functools.wraps(function)
    def routed(value: Any, *args: Any, **kwargs: Any) -> Any:
        return route(value, function(value, *args, **kwargs))

    return routed


def _map_runnables(value: Any) -> Any:
    match value:
        case Runnable():
            return watched(value)
        case dict():
            return {key: _map_runnables(item) for key, item in value.items()}
        case list():
            return [_map_runnables(item) for item in value]
        case tuple():
            return tuple(_map_runnables(item) for item in value)
    return value
