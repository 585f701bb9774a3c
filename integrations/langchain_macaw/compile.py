"""`compile`: a chain that sends its calls as one program."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from contextvars import copy_context
from typing import Any, NamedTuple, cast

from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from langchain_core.runnables.base import RunnableBindingBase, RunnableLike, coerce_to_runnable
from langchain_core.runnables.schema import StreamEvent
from langchain_core.runnables.utils import Input, Output

import langchain_macaw.rules  # noqa: F401  (registers the rules of lowering)
from langchain_macaw.chat_models import ChatMacaw
from langchain_macaw.lowering import Lowering, Scope, rule, warn_once
from langchain_macaw.plan import CURRENT_PLAN, Plan
from langchain_macaw.replay import Run, areplaying, replaying

Configs = RunnableConfig | Sequence[RunnableConfig] | None


def compile(chain: RunnableLike[Input, Output]) -> Runnable[Input, Output]:
    """Wrap a chain so that each run sends all calls that are known ahead in one request.

    The chain itself runs as before, with its callbacks, streaming, retries and exceptions; only the answers
    of its `ChatMacaw` models come from the program. Calls that depend on client code are ordinary requests.

    Args:
        chain: Any Runnable, or what LangChain makes one of. It is not changed.

    Returns:
        A Runnable with the same interface.
    """
    runnable: Runnable[Input, Output] = coerce_to_runnable(cast("Any", chain))
    return runnable if isinstance(runnable, CompiledChain) else CompiledChain(bound=runnable)


class _Planned(NamedTuple):
    plan: Plan
    model: ChatMacaw


class CompiledChain(RunnableBindingBase[Input, Output]):  # type: ignore[no-redef]  # a field named kwargs
    """What `compile` returns: `bound`, run under a plan. It keeps no state between runs.

    `transform` and `atransform` take in their whole input before they start, since planning needs it.
    """

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """LangChain's JSON format knows the chain, not this wrapper."""
        return False

    def invoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """As `bound.invoke`."""
        with self._running([input], config, kwargs) as run:
            return run.context.run(self.bound.invoke, input, config, **kwargs)

    async def ainvoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """As `bound.ainvoke`."""
        async with self._arunning([input], config, kwargs) as run:
            return await run.call(self.bound.ainvoke(input, config, **kwargs))

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
            return run.context.run(self.bound.batch, inputs, config, return_exceptions=return_exceptions, **kwargs)

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
            outputs = self.bound.abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)
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
            bound: Any = self.bound
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
            bound: Any = self.bound
            outputs = bound.abatch_as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs)
            async with aclosing(run.aiterate(outputs)) as items:
                async for item in items:
                    yield item

    def stream(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Output]:
        """As `bound.stream`."""
        with self._running([input], config, kwargs, streaming=True) as run:
            yield from run.iterate(self.bound.stream(input, config, **kwargs))

    async def astream(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Output]:
        """As `bound.astream`."""
        async with self._arunning([input], config, kwargs, streaming=True) as run:
            outputs = self.bound.astream(input, config, **kwargs)
            async with aclosing(run.aiterate(outputs)) as items:
                async for item in items:
                    yield item

    def transform(
        self, input: Iterator[Input], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Output]:
        """As `bound.transform`, once the input is complete."""
        chunks = list(input)
        with self._running(_added_up(chunks), config, kwargs, streaming=True) as run:
            yield from run.iterate(self.bound.transform(iter(chunks), config, **kwargs))

    async def atransform(
        self, input: AsyncIterator[Input], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Output]:
        """As `bound.atransform`, once the input is complete."""
        chunks = [chunk async for chunk in input]
        async with self._arunning(_added_up(chunks), config, kwargs, streaming=True) as run:
            outputs = self.bound.atransform(_asynchronous(chunks), config, **kwargs)
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

    @contextmanager
    def _running(
        self, inputs: Sequence[Input], config: Configs, kwargs: Mapping[str, Any], *, streaming: bool = False
    ) -> Iterator[Run]:
        planned = self._plan(inputs, config, kwargs, streaming)
        if planned is None:
            yield Run(copy_context())
        else:
            with replaying(planned.plan, planned.model._program_client()) as run:
                yield run

    @asynccontextmanager
    async def _arunning(
        self, inputs: Sequence[Input], config: Configs, kwargs: Mapping[str, Any], *, streaming: bool = False
    ) -> AsyncIterator[Run]:
        planned = self._plan(inputs, config, kwargs, streaming)
        if planned is None:
            yield Run(copy_context())
        else:
            async with areplaying(planned.plan, planned.model._async_program_client()) as run:
                yield run

    def _plan(
        self, inputs: Sequence[Input], config: Configs, kwargs: Mapping[str, Any], streaming: bool
    ) -> _Planned | None:
        """What is known ahead of a run; None if nothing is, or if it is part of the plan around this run."""
        try:
            lowering = Lowering(streaming=streaming)
            configs = [config] * len(inputs) if config is None or isinstance(config, dict) else config
            results = []
            for i, (value, one) in enumerate(zip(inputs, configs, strict=True)):
                scope = Scope(
                    path=f"[{i}]" if len(inputs) > 1 else "",
                    kwargs=kwargs,
                    configurable=ensure_config(one).get("configurable", {}),
                )
                results.append(lowering.lower(self.bound, value, scope))
            limit = (configs[0] or {}).get("max_concurrency") if configs else None
            plan = lowering.plan(results, max_concurrency=limit, metadata={"chain": self.get_name()[:256]})
        except Exception as error:
            warn_once(f"{self.get_name()} runs without a program: planning failed with {error!r}.")
            return None
        around = CURRENT_PLAN.get()
        if plan is None or lowering.model is None or (around and around.holds_any(plan.ready_keys())):
            return None
        return _Planned(plan, lowering.model)


@rule(CompiledChain)
def _compiled(lowering: Lowering, chain: CompiledChain[Any, Any], value: Any, scope: Scope) -> Any:
    """Inside another compiled chain, it is part of that one's program."""
    return lowering.lower(chain.bound, value, scope)


def _added_up(chunks: Iterable[Input]) -> list[Input]:
    """The input that chunks make up, as `Runnable.transform` adds them; nothing for no chunks."""
    total: list[Any] = []
    for chunk in chunks:
        try:
            total = [total[0] + chunk] if total else [chunk]
        except TypeError:
            total = [chunk]
    return cast("list[Input]", total)


async def _asynchronous(items: Iterable[Input]) -> AsyncIterator[Input]:
    for item in items:
        yield item
