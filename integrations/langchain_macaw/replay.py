"""Running native code under a plan: the program's stream is read beside it, and ends with it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import Context, copy_context
from typing import Any, NamedTuple, TypeVar

from langchain_macaw.plan import CURRENT_PLAN, Plan
from macaw import AsyncMacawClient, MacawClient
from macaw.errors import MacawError

T = TypeVar("T")

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 10.0
_END = object()


class Run(NamedTuple):
    """Where native code runs: `context` is one in which models answer from `plan`, if there is one."""

    context: Context
    plan: Plan | None = None

    def iterate(self, iterator: Iterator[T]) -> Iterator[T]:
        """Run a generator in the context, wherever its consumer is."""
        try:
            while (item := self.context.run(next, iterator, _END)) is not _END:
                yield item  # type: ignore[misc]
        except BaseException:
            self._abandon()  # before closing, as that waits for branches which may wait for the plan
            raise
        finally:
            self.context.run(getattr(iterator, "close", lambda: None))

    async def aiterate(self, iterator: Any) -> AsyncGenerator[Any]:
        """As `iterate`; each step is a task, as that is what a context can be given to."""
        try:
            while (item := await self.call(_next(iterator))) is not _END:
                yield item
        except BaseException:
            self._abandon()
            raise
        finally:
            await self.call(iterator.aclose())

    async def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the context."""
        return await asyncio.create_task(coroutine, context=self.context)

    def _abandon(self) -> None:
        if self.plan:
            self.plan.close()


@contextmanager
def replaying(plan: Plan, client: MacawClient) -> Iterator[Run]:
    """Run the program beside native code. What is left of it at the end is cancelled."""
    reader = threading.Thread(target=_read, args=(plan, client), name="macaw-program", daemon=True)
    reader.start()
    try:
        yield _run(plan)
    finally:
        plan.close()
        if plan.closed and plan.program_id is not None:
            # The reader may be blocked in a read, and only the server can end that.
            with suppress(MacawError):
                client.cancel(plan.program_id)
        reader.join(_CLOSE_TIMEOUT_S)


@asynccontextmanager
async def areplaying(plan: Plan, client: AsyncMacawClient) -> AsyncIterator[Run]:
    """As `replaying`, with a task as the reader."""
    reader = asyncio.create_task(_aread(plan, client), name="macaw-program")
    try:
        yield _run(plan)
    finally:
        plan.close()
        if plan.closed:
            reader.cancel()
        await asyncio.wait({reader}, timeout=_CLOSE_TIMEOUT_S)


def _run(plan: Plan) -> Run:
    context = copy_context()
    context.run(CURRENT_PLAN.set, plan)
    return Run(context, plan)


async def _next(iterator: Any) -> Any:
    return await anext(iterator, _END)


def _read(plan: Plan, client: MacawClient) -> None:
    try:
        with client.stream_program(plan.request) as events:
            for event in events:
                plan.feed(event)
                if plan.closed:
                    break
    except Exception as error:
        _report(plan, error)
    finally:
        plan.end()


async def _aread(plan: Plan, client: AsyncMacawClient) -> None:
    try:
        async with await client.stream_program(plan.request) as events:
            async for event in events:
                plan.feed(event)
    except Exception as error:
        _report(plan, error)
    finally:
        plan.end()


def _report(plan: Plan, error: Exception) -> None:
    """Models ask for the missing answers one by one, and it is theirs to raise what is wrong."""
    if not plan.closed:
        logger.warning("The chain's program was lost: %r. Its remaining calls are ordinary requests.", error)
