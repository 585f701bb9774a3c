"""`compile`: a chain that sends its calls as one program."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from contextvars import copy_context
from functools import cached_property
from typing import Any, cast

from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from langchain_core.runnables.base import RunnableBindingBase, RunnableLike, coerce_to_runnable
from langchain_core.runnables.schema import StreamEvent
from langchain_core.runnables.utils import Input, Output

import langchain_macaw.rules  # noqa: F401  (registers the rules of lowering)
from langchain_macaw.lowering import Lowering, Scope, warn_once
from langchain_macaw.plan import CURRENT_PLAN, Plan
from langchain_macaw.registry import rule
from langchain_macaw.replay import Run, areplaying, replaying
from langchain_macaw.steps import added_up, anoting, noting, watched

Configs = RunnableConfig | Sequence[RunnableConfig] | None


def compile(chain: RunnableLike[Input, Output]) -> Runnable[Input, Output]:
    """Wrap a chain so that each run sends all calls that are known ahead in one request.

    The chain itself runs as before, with its callbacks, streaming, retries and exceptions; only the answers
    of its `ChatMacaw` models come from the program. What depends on client code joins it when that has run.

    Args:
        chain: Any Runnable, or what LangChain makes one of. It is not changed.

    Returns:
        A Runnable with the same interface.
    """
    runnable: Runnable[Input, Output] = coerce_to_runnable(cast("Any", chain))
    return runnable if isinstance(runnable, CompiledChain) else CompiledChain(bound=runnable)


class CompiledChain(RunnableBindingBase[Input, Output]):  # type: ignore[no-redef]  # a field named kwargs
    """What `compile` returns: `bound`, run under a plan. It keeps no state between runs."""

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """LangChain's JSON format knows the chain, not this wrapper."""
        return False

    def __getstate__(self) -> dict[Any, Any]:
        """Of a pickled chain, only the chain itself."""
        state = super().__getstate__()
        return {**state, "__dict__": {k: v for k, v in state["__dict__"].items() if k in type(self).model_fields}}

    def invoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """As `bound.invoke`."""
        with self._running([input], config, kwargs) as run:
            return run.context.run(self._running_chain(run).invoke, input, config, **kwargs)

    async def ainvoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """As `bound.ainvoke`."""
        async with self._arunning([input], config, kwargs) as run:
            return await run.call(self._running_chain(run).ainvoke(input, config, **kwargs))

    def batch(
        self,
        inputs: list[Input],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Output]:
        """As `bound.batch`; all inputs are one program."""
        with self._running(inputs, config, kwargs) as run:
            return run.context.run(
                self._running_chain(run).batch, inputs, config, return_exceptions=return_exceptions, **kwargs
            )

    async def abatch(
        self,
        inputs: list[Input],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Output]:
        """As `bound.abatch`; all inputs are one program."""
        async with self._arunning(inputs, config, kwargs) as run:
            outputs = self._running_chain(run).abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)
            return await run.call(outputs)

    def batch_as_completed(  # type: ignore[override]  # the base has overloads
        self,
        inputs: Sequence[Input],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, Output | Exception]]:
        """As `bound.batch_as_completed`; all inputs are one program."""
        with self._running(inputs, config, kwargs) as run:
            bound: Any = self._running_chain(run)
            outputs = bound.batch_as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs)
            yield from run.iterate(outputs)

    async def abatch_as_completed(  # type: ignore[override]  # the base has overloads
        self,
        inputs: Sequence[Input],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> AsyncIterator[tuple[int, Output | Exception]]:
        """As `bound.abatch_as_completed`; all inputs are one program."""
        async with self._arunning(inputs, config, kwargs) as run:
            bound: Any = self._running_chain(run)
            outputs = bound.abatch_as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs)
            async with aclosing(run.aiterate(outputs)) as items:
                async for item in items:
                    yield item

    def stream(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Output]:
        """As `bound.stream`."""
        with self._running([input], config, kwargs, streaming=True) as run:
            yield from run.iterate(self._running_chain(run).stream(input, config, **kwargs))

    async def astream(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Output]:
        """As `bound.astream`."""
        async with self._arunning([input], config, kwargs, streaming=True) as run:
            outputs = self._running_chain(run).astream(input, config, **kwargs)
            async with aclosing(run.aiterate(outputs)) as items:
                async for item in items:
                    yield item

    def transform(
        self, input: Iterator[Input], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Output]:
        """As `bound.transform`; what is planned is known when the input has ended."""
        plan, chunks = self._new_plan(config, streaming=True), cast("list[Input]", [])
        with replaying(plan) as run:
            noted = noting(input, chunks, lambda: self._fill(plan, added_up(chunks), config, kwargs))
            yield from run.iterate(self._running_chain(run).transform(noted, config, **kwargs))

    async def atransform(
        self, input: AsyncIterator[Input], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Output]:
        """As `bound.atransform`; what is planned is known when the input has ended."""
        plan, chunks = self._new_plan(config, streaming=True), cast("list[Input]", [])
        async with areplaying(plan) as run:
            noted = anoting(input, chunks, lambda: self._fill(plan, added_up(chunks), config, kwargs))
            outputs = self._running_chain(run).atransform(noted, config, **kwargs)
            async with aclosing(run.aiterate(outputs)) as items:
                async for item in items:
                    yield item

    def astream_events(  # type: ignore[override]  # the base has overloads
        self, input: Input, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[StreamEvent] | Awaitable[Any]:
        """As `bound.astream_events`. The base class would ask `bound`, past the plan; this asks `astream`."""
        if kwargs.get("version") == "v3":
            return cast("Awaitable[Any]", super().astream_events(input, config, **kwargs))
        return cast("AsyncIterator[StreamEvent]", Runnable.astream_events(self, input, config, **kwargs))

    @cached_property
    def _watched(self) -> Runnable[Input, Output]:
        """`bound`, reporting its client steps; `bound` itself where that fails."""
        try:
            return watched(self.bound)
        except Exception as error:
            warn_once(f"{self.get_name()} runs without reports of its client steps: {error!r}.")
            return self.bound

    def _running_chain(self, run: Run) -> Runnable[Input, Output]:
        return self._watched if run.plan else self.bound

    @contextmanager
    def _running(
        self, inputs: Sequence[Input], config: Configs, kwargs: Mapping[str, Any], *, streaming: bool = False
    ) -> Iterator[Run]:
        plan = self._plan(inputs, config, kwargs, streaming)
        if plan is None:
            yield Run(copy_context())
        else:
            with replaying(plan) as run:
                yield run

    @asynccontextmanager
    async def _arunning(
        self, inputs: Sequence[Input], config: Configs, kwargs: Mapping[str, Any], *, streaming: bool = False
    ) -> AsyncIterator[Run]:
        plan = self._plan(inputs, config, kwargs, streaming)
        if plan is None:
            yield Run(copy_context())
        else:
            async with areplaying(plan) as run:
                yield run

    def _plan(
        self, inputs: Sequence[Input], config: Configs, kwargs: Mapping[str, Any], streaming: bool
    ) -> Plan | None:
        """What is known ahead of a run; None if there is nothing to plan, or it is part of the plan around this run."""
        plan = self._new_plan(config, streaming=streaming)
        if not self._fill(plan, inputs, config, kwargs):
            return None
        around = CURRENT_PLAN.get()
        return None if around and around.holds_any(plan.ready_keys()) else plan

    def _new_plan(self, config: Configs, *, streaming: bool) -> Plan:
        first = config if config is None or isinstance(config, dict) else next(iter(config), None)
        return Plan(
            Lowering(streaming=streaming),
            max_concurrency=(first or {}).get("max_concurrency"),
            metadata={"chain": self.get_name()[:256]},
        )

    def _fill(self, plan: Plan, inputs: Sequence[Input], config: Configs, kwargs: Mapping[str, Any]) -> bool:
        """Plan a run on `inputs`. Whether there are calls in it, or may be."""

        def lower(lowering: Lowering) -> list[Any]:
            configs = [config] * len(inputs) if config is None or isinstance(config, dict) else config
            results = []
            for i, (value, one) in enumerate(zip(inputs, configs, strict=True)):
                scope = Scope(
                    path=f"[{i}]" if len(inputs) > 1 else "",
                    kwargs=kwargs,
                    configurable=ensure_config(one).get("configurable", {}),
                )
                results.append(lowering.lower(self._watched, value, scope))
            return results

        try:
            return plan.read(lower)
        except Exception as error:
            warn_once(f"{self.get_name()} runs without a program: planning failed with {error!r}.")
            return False


@rule(CompiledChain, parts=("bound",), transparent=True)
def _compiled(lowering: Lowering, chain: CompiledChain[Any, Any], value: Any, scope: Scope) -> Any:
    """Inside another compiled chain, it is part of that one's program."""
    return lowering.lower(chain.bound, value, scope)
