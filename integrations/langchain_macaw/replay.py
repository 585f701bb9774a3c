"""Running native code under a plan: the program's stream is read beside it, and ends with it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import Context, copy_context
from typing import TypeVar

from langchain_macaw.plan import CURRENT_PLAN, Plan
from macaw import AsyncMacawClient, MacawClient
from macaw.errors import MacawError

T = TypeVar("T")

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 10.0
_END = object()


@contextmanager
def replaying(plan: Plan, client: MacawClient) -> Iterator[Context]:
    """Start the program; the context is one in which models answer from it. What is left of it at the end is cancelled."""
    reader = threading.Thread(target=_read, args=(plan, client), name="macaw-program", daemon=True)
    reader.start()
    try:
        yield _context_with(plan)
    finally:
        _stop(plan, client, reader)


@asynccontextmanager
async def areplaying(plan: Plan, client: AsyncMacawClient) -> AsyncIterator[Context]:
    """As `replaying`, with a task as the reader."""
    reader = asyncio.create_task(_aread(plan, client), name="macaw-program")
    try:
        yield _context_with(plan)
    finally:
        if not plan.ended:
            plan.closed = True
            reader.cancel()
        await asyncio.wait({reader})


def iterate_in(context: Context, iterator: Iterator[T]) -> Iterator[T]:
    """Run a generator's code in `context`, wherever the consumer is."""
    try:
        while (item := context.run(next, iterator, _END)) is not _END:
            yield item  # type: ignore[misc]
    finally:
        context.run(getattr(iterator, "close", lambda: None))


async def aiterate_in(context: Context, iterator: AsyncIterator[T]) -> AsyncIterator[T]:
    """As `iterate_in`; each step is a task, as that is what a context can be given to."""

    async def step() -> T | object:
        return await anext(iterator, _END)

    async def close() -> None:
        await iterator.aclose()  # type: ignore[attr-defined]

    try:
        while (item := await asyncio.create_task(step(), context=context)) is not _END:
            yield item  # type: ignore[misc]
    finally:
        await asyncio.create_task(close(), context=context)


def _context_with(plan: Plan) -> Context:
    context = copy_context()
    context.run(CURRENT_PLAN.set, plan)
    return context


def _read(plan: Plan, client: MacawClient) -> None:
    try:
        with client.stream_program(plan.request) as events:
            for event in events:
                plan.feed(event)
                if plan.closed:
                    break
    except MacawError as error:
        _report(plan, error)
    finally:
        plan.end()


async def _aread(plan: Plan, client: AsyncMacawClient) -> None:
    try:
        async with await client.stream_program(plan.request) as events:
            async for event in events:
                plan.feed(event)
    except MacawError as error:
        _report(plan, error)
    finally:
        plan.end()


def _report(plan: Plan, error: MacawError) -> None:
    if not plan.closed:
        logger.warning("The chain's program was lost; its calls are sent one by one. %s", error)


def _stop(plan: Plan, client: MacawClient, reader: threading.Thread) -> None:
    """End the reader. It may be blocked in a read, which only the server can end: by cancelling the program."""
    if not plan.ended:
        plan.closed = True
        with suppress(MacawError):
            if plan.program_id is not None:
                client.cancel(plan.program_id)
    reader.join(_CLOSE_TIMEOUT_S)
