"""The names that Parrot's published programs use (Lin et al., OSDI 2024, figure 7, and Parrot's repository).

With ``from macaw import parrot as P`` in place of Parrot's import, such a program runs on a Macaw server. Prompts are
text completions, as there. What Parrot's engines alone know (`models` of another name, cache hints) is refused.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from macaw.functions.function import Function, Input
from macaw.functions.function import Output as _Output
from macaw.functions.native import NativeFunction
from macaw.functions.session import Session
from macaw.functions.session import variable as _variable
from macaw.functions.variable import Objective
from macaw.functions.variable import SemanticVariable as _Variable

LATENCY: Objective = "latency"
THROUGHPUT: Objective = "throughput"


def allowing_newline(text: str) -> str:
    """Parrot's formatter that keeps line ends: without indents, and with single spaces only."""
    return re.sub(" {2,}", " ", text.replace("\t", "").replace(" " * 4, ""))


def standard_formatter(text: str) -> str:
    """Parrot's default formatter: the prompt as one line."""
    return re.sub(" {2,}", " ", allowing_newline(text).replace("\n", " "))


class SamplingConfig(dict[str, Any]):
    """Parrot's sampling fields and defaults, as OpenAI's."""

    def __init__(
        self,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_gen_length: int = 512,
        ignore_tokenizer_eos: bool = False,
        stop_token_ids: Sequence[int] = (),
        stop_str: str | list[str] | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
    ) -> None:
        super().__init__(
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_gen_length,
            ignore_eos=ignore_tokenizer_eos,
            stop_token_ids=list(stop_token_ids),
            stop=stop_str,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
        )


class Output(_Output):
    """Marks an output, perhaps with Parrot's sampling."""

    def __init__(self, sampling_config: SamplingConfig | None = None) -> None:
        options: Any = sampling_config or {}
        super().__init__(**options)


def semantic_function(
    function: Callable[..., Any] | None = None,
    /,
    *,
    models: Sequence[str] = (),
    formatter: Callable[[str], str] | None = standard_formatter,
) -> Any:
    """`macaw.function` with Parrot's arguments: a text completion, formatted by `formatter`."""
    if len(models) > 1:
        raise ValueError(f"models={list(models)!r}: name at most one; a Macaw server places the call itself.")
    options: dict[str, Any] = {**SamplingConfig(), **({"model": models[0]} if models else {})}

    def make(f: Callable[..., Any]) -> Function:
        return Function(f, chat=False, clean=formatter or (lambda text: text), **options)

    return make if function is None else make(function)


def native_function(function: Callable[..., Any] | None = None, /) -> Any:
    """`macaw.native_function`, and Parrot's way to return: parameters marked `Output`, to be `set`."""

    def make(f: Callable[..., Any]) -> NativeFunction:
        parameters = inspect.signature(f, eval_str=True).parameters.values()
        outputs = [p.name for p in parameters if p.annotation is Output or isinstance(p.annotation, Output)]
        if not outputs:
            return NativeFunction(f)

        def run(*args: Any, **kwargs: Any) -> Any:
            slots = {name: _Slot(name) for name in outputs}
            f(*args, **kwargs, **slots)
            values = [slots[name].taken() for name in outputs]
            return values if len(values) > 1 else values[0]

        run.__name__, run.__doc__, run.__module__ = f.__name__, f.__doc__, f.__module__
        run.__signature__ = inspect.Signature([p for p in parameters if p.name not in outputs])  # type: ignore[attr-defined]
        return NativeFunction(run, outputs)

    return make if function is None else make(function)


SemanticFunction = function = semantic_function


class SemanticVariable(_Variable):
    """A variable of a text, as in the paper's ``P.SemanticVariable("a snake game")``; also an annotation."""

    def __init__(self, content: str) -> None:
        super().__init__("variable", value=content)


def variable(name: str | None = None, content: str | None = None) -> _Variable:
    """`macaw.variable` with Parrot's argument names."""
    return _variable(name or "variable", value=content)


class VirtualMachine:
    """Runs programs on a server, one session for each.

    Args:
        core_http_addr: The server.
        mode: `debug` logs what is sent, under the logger `macaw`.
        os_http_addr: The same as `core_http_addr`, in Parrot's older programs.
    """

    def __init__(
        self,
        core_http_addr: str | None = None,
        mode: Literal["release", "debug"] = "release",
        *,
        os_http_addr: str | None = None,
    ) -> None:
        self._address = core_http_addr or os_http_addr
        if mode == "debug":
            logging.getLogger("macaw").setLevel(logging.DEBUG)

    @contextmanager
    def running_scope(self, timeit: bool = False) -> Iterator[Session]:
        """What is called within goes to the server; `timeit` prints how long it took."""
        start_s = time.perf_counter()
        with Session(self._address) as session:
            yield session
        if timeit:
            print(f"{time.perf_counter() - start_s:.3f} s")

    def run(self, program: Callable[..., Any], timeit: bool = False, args: Sequence[Any] = ()) -> float:
        """Run a function, or a coroutine function, and return the seconds that it took."""
        start_s = time.perf_counter()
        with self.running_scope(timeit):
            if inspect.iscoroutinefunction(program):
                asyncio.run(program(*args))
            else:
                program(*args)
        return time.perf_counter() - start_s


class _Slot:
    """Takes what a native function gives to an output."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._values: list[str] = []

    def set(self, content: str) -> None:
        self._values.append(content)

    def taken(self) -> str:
        if len(self._values) != 1:
            raise ValueError(f"{self._name}.set() was called {len(self._values)} times, not once")
        return self._values[0]


__all__ = [
    "LATENCY",
    "THROUGHPUT",
    "Input",
    "Output",
    "SamplingConfig",
    "SemanticFunction",
    "SemanticVariable",
    "VirtualMachine",
    "allowing_newline",
    "function",
    "native_function",
    "semantic_function",
    "standard_formatter",
    "variable",
]
