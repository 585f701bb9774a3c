"""Running native code under plans: their programs are read beside it, and end with it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from llama_index.llms.macaw.plan import Plan
from macaw.errors import MacawError
from macaw.replay import Replay

if TYPE_CHECKING:
    from llama_index.llms.macaw.base import Macaw
    from macaw import AsyncMacawClient, MacawClient

logger = logging.getLogger(__name__)

CURRENT_RUN: ContextVar[Run | None] = ContextVar("macaw_run", default=None)
"""What requests of this context are answered from."""

MAX_REPLANS = 3
"""Of one run: answers that keep changing what comes next are not foreseen by another plan either."""

_CLOSE_TIMEOUT_S = 10.0


class Lowered(NamedTuple):
    """What is known ahead of a run.

    Attributes:
        plan: The program.
        llm: Whose server it goes to.
        replan: What to plan instead, by the answers so far, for calls that come one after the other: a request which
            was not planned then means that the rest of the plan is wrong too. None if they do not.
    """

    plan: Plan
    llm: Macaw
    replan: Callable[[Sequence[str]], Lowered | None] | None = None


class Run:
    """One run of a compiled object, and the plans that it is answered from.

    Args:
        owner: What runs.
        asynchronous: It is run by the event loop, and so are the readers of its programs; else they are threads.
    """

    def __init__(self, owner: object, *, asynchronous: bool = False) -> None:
        self.owner = owner
        self._parent = CURRENT_RUN.get()
        self._reader: type[_Reader] = _Task if asynchronous else _Thread
        self._readers: list[_Reader] = []
        self._to_come: list[Lowered] = []
        self._replans_left = MAX_REPLANS

    def add(self, lowered: Lowered) -> bool:
        """Start a program whose answers are for this run, unless the server has lost one before."""
        if any(reader.lost for reader in self._readers):
            return False
        self._readers.append(self._reader(lowered))
        return True

    def add_later(self, plans: Iterable[Lowered]) -> None:
        """Start each of these programs as soon as something is asked for that it has."""
        self._to_come.extend(plans)

    def holds(self, keys: Sequence[str]) -> bool:
        """Whether these requests would be answered from here."""
        plans = [lowered.plan for lowered in (*(reader.lowered for reader in self._readers), *self._to_come)]
        return any(plan.holds_all(keys) for plan in plans)

    def take(self, key: str) -> Replay | None:
        """The answer to a request, if it is planned and nobody had it yet."""
        for reader in self._readers:
            if replay := reader.plan.take(key):
                return replay
        for lowered in self._to_come:
            if lowered.plan.holds_all([key]):
                self._to_come.remove(lowered)
                return lowered.plan.take(key) if self.add(lowered) else None
        return self._take_replanned(key) or (self._parent.take(key) if self._parent else None)

    def _take_replanned(self, key: str) -> Replay | None:
        """The answer to a request that a chain did not foresee, from a new plan for what is left of the chain.

        A last call is as well an ordinary request. What that is answered is not seen here, so no plan comes after it.
        """
        chain = [reader for reader in self._readers if reader.lowered.replan]
        replay = None
        if chain and self._replans_left:
            self._replans_left -= 1
            answers = [answer for reader in chain for answer in reader.plan.answers]
            replan = chain[-1].lowered.replan
            lowered = replan(answers) if replan else None
            if lowered and lowered.plan.num_calls > 1 and lowered.plan.holds_all([key]) and self.add(lowered):
                replay = lowered.plan.take(key)
        for reader in chain:
            reader.plan.close()
            reader.cancel()
        if replay is None:
            self._replans_left = 0
        return replay

    def drop(self) -> None:
        """Stop the programs: what follows is not what they were made for."""
        self._to_come.clear()
        for reader in self._readers:
            reader.plan.close()
            reader.cancel()

    def close(self) -> None:
        """Stop what is left and wait for the readers' end."""
        self.drop()
        for reader in self._readers:
            reader.join()

    async def aclose(self) -> None:
        """As `close`."""
        self.drop()
        for reader in self._readers:
            await reader.ajoin()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` with its requests answered from here."""
        token = CURRENT_RUN.set(self)
        try:
            return function(*args, **kwargs)
        finally:
            CURRENT_RUN.reset(token)

    async def acall(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Await `coroutine` with its requests answered from here."""
        token = CURRENT_RUN.set(self)
        try:
            return await coroutine
        finally:
            CURRENT_RUN.reset(token)


class PlannedStream(Generator[Any, Any, None]):
    """A streamed answer whose requests come from a run; the run ends with it.

    The requests are made while it is consumed, in the consumer's context, in which spans and tags must stay what
    they are: so the run is current for the length of a step only.
    """

    def __init__(self, inner: Generator[Any, Any, Any], run: Run) -> None:
        self._inner = inner
        self._run: Run | None = run

    def send(self, value: Any) -> Any:
        """As the generator's own."""
        return self._step(self._inner.send, value)

    def throw(self, *exception: Any) -> Any:
        """As the generator's own."""
        return self._step(self._inner.throw, *exception)

    def close(self) -> None:
        """Close the generator, and cancel what is left of the programs."""
        run, self._run = self._run, None
        if run is not None:
            run.drop()
            try:
                self._inner.close()
            finally:
                run.close()

    def __del__(self) -> None:
        self.close()

    def _step(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return self._run.call(function, *args) if self._run else function(*args)
        except BaseException:  # StopIteration among them
            self.close()
            raise


class AsyncPlannedStream(AsyncGenerator[Any, Any]):
    """The asynchronous `PlannedStream`."""

    def __init__(self, inner: AsyncGenerator[Any, Any], run: Run) -> None:
        self._inner = inner
        self._run: Run | None = run

    async def asend(self, value: Any) -> Any:
        """As the generator's own."""
        return await self._step(self._inner.asend(value))

    async def athrow(self, *exception: Any) -> Any:
        """As the generator's own."""
        return await self._step(self._inner.athrow(*exception))

    async def aclose(self) -> None:
        """Close the generator, and cancel what is left of the programs."""
        run, self._run = self._run, None
        if run is not None:
            run.drop()
            try:
                await self._inner.aclose()
            finally:
                await run.aclose()

    def __del__(self) -> None:
        if self._run is not None:
            self._run.drop()

    async def _step(self, step: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await (self._run.acall(step) if self._run else step)
        except BaseException:  # StopAsyncIteration among them
            await self.aclose()
            raise


class _Reader:
    """Feeds a plan from its program's stream; `lost` is whether that broke."""

    def __init__(self, lowered: Lowered) -> None:
        self.lost = False
        self.lowered = lowered
        self.plan = lowered.plan

    def cancel(self) -> None:
        """Stop the program, if it was given up."""
        raise NotImplementedError

    def join(self) -> None:
        """Wait for the end, where that does not block the loop that has to bring it about."""

    async def ajoin(self) -> None:
        """Wait for the end."""
        self.join()

    def _report(self, error: Exception) -> None:
        """Calls ask for the missing answers one by one, and it is theirs to raise what is wrong."""
        if not self.plan.closed:
            self.lost = True
            logger.warning("A program was lost: %r. Its remaining calls are ordinary requests.", error)


class _Thread(_Reader):
    def __init__(self, lowered: Lowered) -> None:
        super().__init__(lowered)
        self._client: MacawClient = lowered.llm._program_client()
        self._cancelled = False
        self._thread = threading.Thread(target=self._read, name="macaw-program", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """The reader may be blocked in a read, and only the server can end that."""
        if self.plan.closed and self.plan.program_id is not None and not self._cancelled:
            self._cancelled = True
            with suppress(MacawError):
                self._client.cancel(self.plan.program_id)

    def join(self) -> None:
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _read(self) -> None:
        try:
            with self._client.stream_program(self.plan.request) as events:
                for event in events:
                    self.plan.feed(event)
                    if self.plan.closed:
                        break
        except Exception as error:
            self._report(error)
        finally:
            self.plan.end()


class _Task(_Reader):
    def __init__(self, lowered: Lowered) -> None:
        super().__init__(lowered)
        self._client: AsyncMacawClient = lowered.llm._async_program_client()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._read(), name="macaw-program")

    def cancel(self) -> None:
        if self.plan.closed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def ajoin(self) -> None:
        await asyncio.wait({self._task}, timeout=_CLOSE_TIMEOUT_S)

    async def _read(self) -> None:
        try:
            async with await self._client.stream_program(self.plan.request) as events:
                async for event in events:
                    self.plan.feed(event)
        except Exception as error:
            self._report(error)
        finally:
            self.plan.end()
