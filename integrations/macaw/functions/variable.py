"""Semantic variables: futures of text."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import namedtuple
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

from macaw.errors import MacawError, UpstreamFailedError

if TYPE_CHECKING:
    from macaw.functions.graph import Node
    from macaw.functions.session import Session

Objective = Literal["latency", "throughput"]


class SemanticVariable:
    """A text that is there now or later.

    Functions return variables and take them as arguments. `macaw.variable` makes one by hand.

    Attributes:
        name: As the function or the caller calls it.
        maker: The function that makes it; None where the client does.
        session: Where its value comes from; None where it was there from the start.
    """

    def __init__(
        self,
        name: str,
        *,
        value: str | None = None,
        session: Session | None = None,
        maker: str | None = None,
        producer: Node | None = None,
    ) -> None:
        self.name = name
        self.maker = maker
        self.session = session
        self.producer = producer
        self.future: Future[str] = Future()
        self.future.set_running_or_notify_cancel()  # from here on, who gives up waiting does not cancel it
        self._lock = threading.Lock()
        self._consumers: list[Node] = []
        self._text = ""  # what has been streamed
        self._taps: list[Callable[[str | None], object]] = []
        if value is not None:
            settle(self, value)

    @property
    def ready(self) -> bool:
        """Whether it has its value, or an error in its place."""
        return self.future.done()

    def get(
        self,
        objective: Objective = "latency",
        deadline_ms: float | None = None,
        *,
        perf: Objective | None = None,
    ) -> str:
        """The value; waits for it.

        The first one asked for sends everything that was built so far.

        Args:
            objective: What matters: `latency`, or `throughput` for what may wait for others' latency.
            deadline_ms: Milliseconds from now after which the answer is worthless: its whole program ends then.
            perf: Parrot's name for `objective`.

        Raises:
            MacawError: There is no value. The message names the function, the output, and the first cause.
            RuntimeError: Called on the session's own event loop, which it would block for ever.
        """
        if self.session is not None and not self.ready:
            self.session.check_may_block(self)
        self._ask(perf or objective, deadline_ms)
        return self.future.result()

    async def aget(
        self, objective: Objective = "latency", deadline_ms: float | None = None, *, perf: Objective | None = None
    ) -> str:
        """`get` for asyncio; ``await variable`` is the same with the defaults."""
        self._ask(perf or objective, deadline_ms)
        return await asyncio.wrap_future(self.future)

    def set(self, value: str) -> None:
        """Give a variable that was made by ``macaw.variable(name)`` its value, once.

        Raises:
            ValueError: It has one, or a function makes it.
        """
        if self.producer is not None:
            raise ValueError(f"{self.label} gets its value from {self.maker}() and cannot be set.")
        if not settle(self, checked_text(value, self.label)):
            raise ValueError(f"{self.label} already has its value. A variable is set once: make a new one.")

    def stream(self, objective: Objective = "latency", deadline_ms: float | None = None) -> Iterator[str]:
        """Pieces of the value as they are written. Raises what `get` raises, at the end."""
        if self.session is not None and not self.ready:
            self.session.check_may_block(self)
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ask(objective, deadline_ms)
        self._tap(pieces.put)
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            self._untap(pieces.put)
        self.future.result()

    async def astream(self, objective: Objective = "latency", deadline_ms: float | None = None) -> AsyncIterator[str]:
        """`stream` for asyncio; ``async for piece in variable`` is the same with the defaults."""
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        self._ask(objective, deadline_ms)
        self._tap(put)
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
        finally:
            self._untap(put)
        self.future.result()

    @property
    def label(self) -> str:
        """For messages: whose output it is."""
        return f"variable {self.name!r}" if self.maker is None else f"{self.maker}(): output {self.name!r}"

    def __await__(self) -> Generator[Any, None, str]:
        return self.aget().__await__()

    def __aiter__(self) -> AsyncIterator[str]:
        return self.astream()

    def __repr__(self) -> str:
        maker = f" of {self.maker}()" if self.maker else ""
        state = "waits" if not self.ready else "failed" if self.future.exception() else repr(self.future.result()[:60])
        return f"<SemanticVariable {self.name!r}{maker}: {state}>"

    def __str__(self) -> str:
        if not self.ready:
            raise TypeError(
                f"The value of {self.label} is not known yet, so it cannot be put into a string. Pass the variable "
                "itself to a function, or ask for its value with .get() or await."
            )
        return self.future.result()

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def add_consumer(self, node: Node) -> None:
        """Note who fails if this does; of no interest once it is settled."""
        with self._lock:
            if not self.ready:
                self._consumers.append(node)

    def write(self, piece: str) -> None:
        """Take a piece of the value that is being written."""
        if not piece:
            return
        with self._lock:
            self._text += piece
            for tap in self._taps:
                tap(piece)

    def _ask(self, objective: Objective, deadline_ms: float | None) -> None:
        if objective not in ("latency", "throughput"):
            raise ValueError(f"objective {objective!r} is not one of 'latency' and 'throughput'.")
        if deadline_ms is not None and deadline_ms <= 0:
            raise ValueError(f"deadline_ms {deadline_ms!r} is not over 0.")
        if self.session is not None and not self.ready:
            self.session.ask(self, objective, deadline_ms)

    def _tap(self, tap: Callable[[str | None], object]) -> None:
        with self._lock:
            if self._text:
                tap(self._text)
            if self.ready:
                tap(None)
            else:
                self._taps.append(tap)

    def _untap(self, tap: Callable[[str | None], object]) -> None:
        with self._lock:
            if tap in self._taps:
                self._taps.remove(tap)


class Text(tuple[str | SemanticVariable, ...]):
    """Texts and variables in a row, made by `macaw.join`; an argument like any text."""

    __slots__ = ()


def join(values: Iterable[str | SemanticVariable], separator: str = "\n") -> Text:
    """Texts and variables as one argument, with `separator` between; nothing waits for their values."""
    parts: list[str | SemanticVariable] = []
    for value in values:
        if not isinstance(value, str | SemanticVariable):
            raise TypeError(f"join() got {value!r}; texts and semantic variables are accepted.")
        parts += [separator, value] if parts else [value]
    return Text(parts)


def outputs_type(names: Sequence[str]) -> Callable[..., Any]:
    """Makes named tuples of outputs; a name that is none in Python is replaced by its place."""
    make: Any = namedtuple
    result: Callable[..., Any] = make("Outputs", names, rename=True)
    return result


def settle(variable: SemanticVariable, value: str) -> bool:
    """Give a variable its value; False where it already has one, or an error."""
    with variable._lock:
        if variable.ready:
            return False
        rest = value[len(variable._text) :] if value.startswith(variable._text) else ""
        variable._text = value
        variable.future.set_result(value)
        for tap in variable._taps:
            if rest:
                tap(rest)
            tap(None)
        variable._taps.clear()
    variable._consumers.clear()
    return True


def fail(variable: SemanticVariable, error: MacawError) -> None:
    """Give a variable an error in place of its value, and everything that needs it too."""
    pending = [(variable, error)]
    while pending:
        variable, own = pending.pop()
        with variable._lock:
            if variable.ready:
                continue
            variable.future.set_exception(own)
            for tap in variable._taps:
                tap(None)
            variable._taps.clear()
        for node in variable._consumers:
            pending += [(output, upstream_error(output, error)) for output in node.outputs]
        variable._consumers.clear()


def upstream_error(variable: SemanticVariable, cause: BaseException) -> UpstreamFailedError:
    """The error of a variable whose maker has no input; `cause` is that input's, or the one before it."""
    root = cause.__cause__ if isinstance(cause, UpstreamFailedError) and cause.__cause__ is not None else cause
    error = UpstreamFailedError(f"{variable.label} failed for want of an input. {root}")
    error.__cause__ = root
    return error


def located(variable: SemanticVariable, error: MacawError) -> MacawError:
    """The server's error with the function and the output in front."""
    found = type(error)(
        f"{variable.label} failed. {error.message}",
        code=error.code,
        param=error.param,
        status=error.status,
        retry_after_s=error.retry_after_s,
    )
    found.__cause__ = error.__cause__
    return found


def checked_text(value: object, what: str) -> str:
    """A text as it can be sent.

    Raises:
        TypeError: It is none.
        ValueError: It is not valid Unicode.
    """
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise TypeError(
            f"{what} got {_named(value)}; a text, a number or a semantic variable is accepted. Turn it into "
            "text first: json.dumps(...) for data, macaw.join(...) for a list."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half a surrogate pair ({value[error.start]!r}) at character {error.start:,}, which is "
            "no text. Pass valid Unicode."
        ) from None
    return value


def _named(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def text_of(value: object, what: str) -> Text:
    """An argument as text with variables in it; see `checked_text` for what is refused."""
    if isinstance(value, SemanticVariable):
        return Text((value,))
    if isinstance(value, Text):
        return Text(part if isinstance(part, SemanticVariable) else checked_text(part, what) for part in value)
    return Text((checked_text(value, what),))
