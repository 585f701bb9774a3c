"""`autocompile`: the switch under which chains run as `compile` would run them, without being wrapped."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager
from contextvars import Context, ContextVar, copy_context
from typing import Any, Literal, NamedTuple, overload

from langchain_core.runnables import Runnable

from langchain_macaw.chat_models import ChatMacaw
from langchain_macaw.compile import CompiledChain
from langchain_macaw.plan import CURRENT_PLAN
from langchain_macaw.replay import Run

_ENTRY_POINTS = (
    "invoke",
    "ainvoke",
    "batch",
    "abatch",
    "batch_as_completed",
    "abatch_as_completed",
    "stream",
    "astream",
    "transform",
    "atransform",
)  # astream_events, stream_events and astream_log come to one of these
_COMPOSED = ("langchain_core.runnables.", "langchain_classic.chains.")
"""Modules whose Runnables are made of other Runnables."""

_entered: ContextVar[Runnable[Any, Any] | None] = ContextVar("macaw_autocompile", default=None)
"""The chain whose entry point was passed on to `CompiledChain` in this context, and comes back from there."""


class _Patch(NamedTuple):
    kind: type[Runnable[Any, Any]]
    name: str
    original: Any
    wrapper: Any


class _Switch:
    """What was patched, and who wants it so: the process as a whole (`on`), or blocks (`num_blocks`)."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.on = False
        self.num_blocks = 0
        self.patches: list[_Patch] = []

    def set(self, *, on: bool, more_blocks: int = 0) -> None:
        """Change who wants it, and patch or restore accordingly. The caller holds the lock."""
        self.on, self.num_blocks = on, self.num_blocks + more_blocks
        wanted = self.on or self.num_blocks > 0
        if wanted and not self.patches:
            self.patches = [_patch(kind, name) for kind in _kinds() for name in _own_entry_points(kind)]
        elif not wanted:
            for patch in self.patches:
                if vars(patch.kind)[patch.name] is patch.wrapper:  # else somebody patched it after us
                    setattr(patch.kind, patch.name, patch.original)
            self.patches = []


_switch = _Switch()


@overload
def autocompile(on: Literal[True] = True) -> AbstractContextManager[None]: ...
@overload
def autocompile(on: Literal[False]) -> None: ...
def autocompile(on: bool = True) -> AbstractContextManager[None] | None:
    """Run every chain of this process that has a Macaw model in it as if it had gone through `compile`.

    It is in force as soon as it is called, for chains that exist already and those to come, in all threads and
    event loops. What is asked for while a program runs is part of that program, or an ordinary request. With
    ``autocompile(False)``, LangChain's classes are again what they were.

    Legacy chains take part if `langchain_classic` is imported before the call.

    Example:
        .. code-block:: python

            autocompile()
            chain.invoke(...)  # one request
            autocompile(False)

            with autocompile():  # for this block only
                chain.invoke(...)

    Args:
        on: False switches off; blocks that are still open keep it on until they end.

    Returns:
        A context manager, if a block is all it should be on for.
    """
    with _switch.lock:
        before = _switch.on
        _switch.set(on=on)
    return _block(before) if on else None


@contextmanager
def _block(before: bool) -> Iterator[None]:
    with _switch.lock:
        _switch.set(on=before, more_blocks=1)
    try:
        yield
    finally:
        with _switch.lock:
            _switch.set(on=_switch.on, more_blocks=-1)


# -----------------------------------------------------------------------------------------------------------
# Patching


def _kinds() -> list[type[Runnable[Any, Any]]]:
    found: dict[type[Any], None] = {Runnable: None}
    _add_subclasses(Runnable, found)
    return [kind for kind in found if kind is Runnable or kind.__module__.startswith(_COMPOSED)]


def _add_subclasses(kind: type[Any], found: dict[type[Any], None]) -> None:
    for subclass in kind.__subclasses__():
        if subclass not in found:
            found[subclass] = None
            _add_subclasses(subclass, found)


def _own_entry_points(kind: type[Runnable[Any, Any]]) -> list[str]:
    own = vars(kind)
    return [name for name in _ENTRY_POINTS if name in own and not getattr(own[name], "__isabstractmethod__", False)]


def _patch(kind: type[Runnable[Any, Any]], name: str) -> _Patch:
    original = vars(kind)[name]
    patch = _Patch(kind, name, original, _wrapper(original, name))
    setattr(kind, name, patch.wrapper)
    return patch


def _wrapper(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`original`, but by way of `CompiledChain` at the root; a function of the same kind, and as lazy."""
    compiled = getattr(CompiledChain, name)

    def is_root(runnable: Runnable[Any, Any]) -> bool:
        return (
            bool(_switch.patches)
            and CURRENT_PLAN.get() is None
            and _entered.get() is not runnable
            and getattr(type(runnable), name) is wrapper  # else a subclass calls its base's method
            and _has_model(runnable)
        )

    wrapper: Callable[..., Any]
    if inspect.isasyncgenfunction(original):

        @functools.wraps(original)
        async def wrapper(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            if is_root(self):
                items = Run(_inside(self)).aiterate(compiled(CompiledChain(bound=self), *args, **kwargs))
            else:
                items = original(self, *args, **kwargs)
            async with aclosing(items):
                async for item in items:
                    yield item

    elif inspect.isgeneratorfunction(original):

        @functools.wraps(original)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
            if is_root(self):
                yield from Run(_inside(self)).iterate(compiled(CompiledChain(bound=self), *args, **kwargs))
            else:
                yield from original(self, *args, **kwargs)

    elif inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_root(self):
                return await Run(_inside(self)).call(compiled(CompiledChain(bound=self), *args, **kwargs))
            return await original(self, *args, **kwargs)

    else:

        @functools.wraps(original)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_root(self):
                return _inside(self).run(compiled, CompiledChain(bound=self), *args, **kwargs)
            return original(self, *args, **kwargs)

    return wrapper


def _inside(runnable: Runnable[Any, Any]) -> Context:
    context = copy_context()
    context.run(_entered.set, runnable)
    return context


def _has_model(value: Any) -> bool:
    """Whether a Macaw model is among what `value` is made of; functions are not looked into."""
    if isinstance(value, ChatMacaw):
        return True
    if isinstance(value, Runnable):
        composed = any(kind.__module__.startswith(_COMPOSED) for kind in type(value).__mro__)
        return composed and any(map(_has_model, vars(value).values()))
    if isinstance(value, dict):
        return any(map(_has_model, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_model, value))
