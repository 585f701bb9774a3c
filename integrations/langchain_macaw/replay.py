"""Running native code under a plan: the program's stream is read beside it, and ends with it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import Context, copy_context
from typing import Any, NamedTuple, TypeVar

from langchain_macaw.plan import CURRENT_PLAN, Plan, Posted
from macaw.errors import MacawError
from macaw.protocol import ProgramGrowth, ProgramRequest

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
def replaying(plan: Plan) -> Iterator[Run]:
    """Run the program, if there comes to be one, beside native code. What is left of it at the end is cancelled."""
    threads = _Threads(plan)
    plan.connect(threads.send)
    try:
        yield _run(plan)
    finally:
        plan.close()
        threads.finish()


@asynccontextmanager
async def areplaying(plan: Plan) -> AsyncIterator[Run]:
    """As `replaying`, with tasks in the place of threads."""
    tasks = _Tasks(plan)
    plan.connect(tasks.send)
    try:
        yield _run(plan)
    finally:
        plan.close()
        await tasks.finish()


def _run(plan: Plan) -> Run:
    context = copy_context()
    context.run(CURRENT_PLAN.set, plan)
    return Run(context, plan)


async def _next(iterator: Any) -> Any:
    return await anext(iterator, _END)


class _Threads:
    """One thread reads the program's stream; another one, if it comes to that, posts its growths in their order."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._threads: list[threading.Thread] = []
        self._growths: queue.SimpleQueue[ProgramGrowth | None] = queue.SimpleQueue()
        self._posted = threading.Event()

    def send(self, post: Posted) -> None:
        if isinstance(post, ProgramRequest):
            self._start(self._read, post, name="macaw-program")
        else:
            self._growths.put(post)
            if len(self._threads) == 1:
                self._start(self._grow, name="macaw-growth")

    def finish(self) -> None:
        plan = self._plan
        if plan.closed and plan.program_id is not None:
            # The reader may be blocked in a read, and only the server can end that.
            with suppress(MacawError):
                plan.model._program_client().cancel(plan.program_id)
        elif plan.open:
            self.send(ProgramGrowth(close=True))
        self._growths.put(None)
        for thread in self._threads:
            thread.join(_CLOSE_TIMEOUT_S)

    def _start(self, target: Any, *args: Any, name: str) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read(self, request: ProgramRequest) -> None:
        plan = self._plan
        try:
            with plan.model._program_client().stream_program(request) as events:
                plan.program_id = events.program_id
                self._posted.set()
                for event in events:
                    plan.feed(event)
                    if plan.closed:
                        break
        except Exception as error:
            _report(plan, error)
        finally:
            plan.end()
            self._posted.set()

    def _grow(self) -> None:
        self._posted.wait()
        client = self._plan.model._program_client()
        waiting: list[ProgramGrowth | None] = []
        while None not in waiting:
            waiting = [self._growths.get()]
            while not self._growths.empty():
                waiting.append(self._growths.get())
            growth = _merged([part for part in waiting if part])
            if self._plan.program_id is None or self._plan.closed or not (growth.calls or growth.close):
                continue
            try:
                client.grow(self._plan.program_id, growth)
            except MacawError as error:
                _report_growth(self._plan, growth, error)
                if not growth.calls:  # only its end was to come, and the reader waits for that
                    with suppress(MacawError):
                        client.cancel(self._plan.program_id)


class _Tasks:
    """As `_Threads`, in the event loop; client steps may report from threads all the same."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[None]] = []
        self._growths: list[ProgramGrowth] = []
        self._posted = asyncio.Event()
        self._grown = asyncio.Event()

    def send(self, post: Posted) -> None:
        self._loop.call_soon_threadsafe(self._accept, post)

    async def finish(self) -> None:
        plan = self._plan
        await asyncio.sleep(0)  # for what was sent just now
        if plan.closed:
            for task in self._tasks:
                task.cancel()
        elif plan.open:
            self._accept(ProgramGrowth(close=True))
        reader = self._tasks[:1]
        if reader:
            await asyncio.wait(reader, timeout=_CLOSE_TIMEOUT_S)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT_S)

    def _accept(self, post: Posted) -> None:
        if isinstance(post, ProgramRequest):
            self._tasks.append(self._loop.create_task(self._read(post), name="macaw-program"))
        else:
            self._growths.append(post)
            self._grown.set()
            if len(self._tasks) == 1:
                self._tasks.append(self._loop.create_task(self._grow(), name="macaw-growth"))

    async def _read(self, request: ProgramRequest) -> None:
        plan = self._plan
        try:
            async with await plan.model._async_program_client().stream_program(request) as events:
                plan.program_id = events.program_id
                self._posted.set()
                async for event in events:
                    plan.feed(event)
        except Exception as error:
            _report(plan, error)
        finally:
            plan.end()
            self._posted.set()

    async def _grow(self) -> None:
        await self._posted.wait()
        client = self._plan.model._async_program_client()
        while True:
            await self._grown.wait()
            self._grown.clear()
            growth, self._growths = _merged(self._growths), []
            if self._plan.program_id is None or self._plan.closed:
                continue
            try:
                await client.grow(self._plan.program_id, growth)
            except MacawError as error:
                _report_growth(self._plan, growth, error)
                if not growth.calls:
                    with suppress(MacawError):
                        await client.cancel(self._plan.program_id)


def _merged(parts: Sequence[ProgramGrowth]) -> ProgramGrowth:
    """Growths that wait for the same connection are one request."""
    return ProgramGrowth(
        calls=[call for part in parts for call in part.calls],
        transforms=[transform for part in parts for transform in part.transforms],
        targets=[target for part in parts for target in part.targets],
        close=any(part.close for part in parts),
    )


def _report(plan: Plan, error: Exception) -> None:
    """Models ask for the missing answers one by one, and it is theirs to raise what is wrong."""
    if not plan.closed:
        logger.warning("The chain's program was lost: %r. Its remaining calls are ordinary requests.", error)


def _report_growth(plan: Plan, growth: ProgramGrowth, error: MacawError) -> None:
    plan.lose(growth.calls)
    if not plan.closed:
        logger.warning("The chain's program could not grow: %r. Its new calls are ordinary requests.", error)
