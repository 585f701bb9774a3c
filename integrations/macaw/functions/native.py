"""Native functions: Python code between calls, run by the client."""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Callable, Sequence
from typing import Any, overload

from macaw.functions.graph import ClientStep
from macaw.functions.session import current_session
from macaw.functions.variable import SemanticVariable, outputs_type


class NativeFunction:
    """A Python function over values; made by `macaw.native_function`. Calling it returns variables at once."""

    def __init__(self, function: Callable[..., Any], outputs: Sequence[str] = ("result",)) -> None:
        if not callable(function):
            raise TypeError(f"@macaw.native_function goes on a Python function, not on {function!r}.")
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.__doc__, self.__wrapped__ = function.__doc__, function
        if isinstance(outputs, str) or not outputs or len(set(outputs)) < len(outputs):
            raise ValueError(f"{self.__name__}(): outputs {outputs!r} are not a list of different names.")
        self.outputs = list(outputs)
        self.is_async = inspect.iscoroutinefunction(function)
        self.__signature__ = inspect.signature(function)
        self._answers = outputs_type(self.outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Build a step; variables among the arguments, also within lists and dicts, become their values."""
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.__name__}{self.__signature__}: {error}") from None
        session = current_session()
        session.check_inputs(self.__name__, bound.arguments)
        made = [SemanticVariable(name, session=session, maker=self.__name__) for name in self.outputs]
        step = ClientStep(self, bound, made, contextvars.copy_context())
        for variable in made:
            variable.producer = step
        session.add(step)
        return made[0] if len(made) == 1 else self._answers(*made)

    def texts(self, result: object) -> list[str]:
        """What the function returned, as its outputs' values.

        Raises:
            TypeError: It is no text, or not as many as there are outputs.
        """
        results = [result]
        if len(self.outputs) > 1:
            if not isinstance(result, tuple | list) or len(result) != len(self.outputs):
                raise TypeError(f"returned {result!r:.80}, not one text for each of: {', '.join(self.outputs)}")
            results = list(result)
        for value in results:
            if not isinstance(value, str | int | float):
                raise TypeError(
                    f"returned a {type(value).__name__}; a semantic variable is text. Return a text, such as "
                    "json.dumps(...)"
                )
        return [str(value) for value in results]

    def __repr__(self) -> str:
        return f"<macaw.native_function {self.__name__}{self.__signature__} -> {', '.join(self.outputs)}>"


@overload
def native_function(function: Callable[..., Any], /) -> NativeFunction: ...


@overload
def native_function(*, outputs: Sequence[str] = ("result",)) -> Callable[[Callable[..., Any]], NativeFunction]: ...


def native_function(
    function: Callable[..., Any] | None = None, /, *, outputs: Sequence[str] = ("result",)
) -> NativeFunction | Callable[[Callable[..., Any]], NativeFunction]:
    """Make a client step of a Python function.

    It runs once, when its inputs have their values: in a thread, or where it is ``async``, on the session's event
    loop. What it raises becomes its outputs' error, a `NativeFunctionError` that names the function.

    Args:
        function: When used without arguments, as ``@macaw.native_function``.
        outputs: Names of what it returns: a text, or for several a tuple of them.
    """
    if function is not None:
        return NativeFunction(function)
    return lambda f: NativeFunction(f, outputs)
