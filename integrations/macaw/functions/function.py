"""Semantic functions: a docstring is the prompt, a call is a future."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack, overload

from pydantic import ValidationError

from macaw.functions.graph import Call
from macaw.functions.session import current_session
from macaw.functions.template import Placeholder, Template, Turn
from macaw.functions.variable import SemanticVariable, Text, outputs_type, text_of
from macaw.protocol import ChatCompletionRequest, CompletionRequest


class Sampling(TypedDict, total=False):
    """How an output is written: the fields of OpenAI's request that say so, and the server's own."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[str, float]
    seed: int
    stop: str | list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    min_tokens: int
    response_format: dict[str, Any]
    structured_outputs: dict[str, Any]


class Input:
    """Marks a parameter that stands in the prompt. Every parameter without a mark does too."""


class Output:
    """Marks a parameter that stands for an output: the model makes it, and callers leave it out."""

    def __init__(self, **sampling: Unpack[Sampling]) -> None:
        self.sampling = sampling


class Function:
    """A semantic function; made by `macaw.function`.

    Calling it returns at once: one variable, or for several outputs a named tuple of them.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        outputs: Mapping[str, Sampling] | None = None,
        chat: bool = True,
        clean: Callable[[str], str] = inspect.cleandoc,
        **sampling: Unpack[Sampling],
    ) -> None:
        self.__name__ = self.__qualname__ = _name_of(function)
        self.__doc__, self.__module__, self.__wrapped__ = function.__doc__, function.__module__, function
        if not (function.__doc__ or "").strip():
            raise ValueError(
                f"{self.__name__}() has no docstring, which is its prompt. Write one (and do not run Python with "
                "-OO, which drops them)."
            )
        declared = inspect.signature(function, eval_str=False).parameters
        marked = {name: mark for name, p in declared.items() if (mark := _output_mark(p.annotation, function))}
        self.__signature__ = inspect.Signature(
            [_accepted(p, self.__name__) for p in declared.values() if p.name not in marked]
        )
        try:
            template = Template(
                clean(function.__doc__ or ""),
                parameters=list(self.__signature__.parameters),
                output_parameters=marked,
                chat=chat,
            )
        except ValueError as error:
            raise ValueError(f"Prompt of {self.__name__}(): {error}") from None
        self._chat = chat
        order = {name: i for i, name in enumerate(marked)}
        self.outputs = sorted(template.outputs, key=lambda name: order.get(name, len(order)))
        self._prompts = template.prompts
        for name in outputs or ():
            if name not in self.outputs:
                raise ValueError(f"{self.__name__}() has no output {name!r}; it has: {', '.join(self.outputs)}.")
        given = {name: {**marked[name].sampling} if name in marked else {} for name in self.outputs}
        self._options = {
            name: self._checked(name, {**sampling, **given[name], **(outputs or {}).get(name, {})})
            for name in self.outputs
        }
        self._answers = outputs_type(self.outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Build a call.

        Args:
            *args: Texts, numbers, `macaw.join(...)`, or variables; also by keyword.
            **kwargs: The same.

        Raises:
            TypeError: An argument is missing, not known or of another type.
        """
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.__name__}{self.__signature__}: {error}") from None
        bound.apply_defaults()
        session = current_session()
        values = {
            name: text_of(value, f"{self.__name__}(): argument {name!r}") for name, value in bound.arguments.items()
        }
        session.check_inputs(self.__name__, values)
        made: dict[str, SemanticVariable] = {}
        for name, turns in self._prompts.items():
            made[name] = SemanticVariable(name, session=session, maker=self.__name__)
            call = Call(self.__name__, made[name], _filled(turns, values, made), self._options[name])
            made[name].producer = call
            session.add(call)
        return made[self.outputs[0]] if len(made) == 1 else self._answers(*(made[name] for name in self.outputs))

    def __repr__(self) -> str:
        return f"<macaw.function {self.__name__}{self.__signature__} -> {', '.join(self.outputs)}>"

    def _checked(self, output: str, options: dict[str, Any]) -> dict[str, Any]:
        """Refuse at once what the server would refuse, by the protocol's own types."""
        try:
            if self._chat:
                ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": ""}], **options})
            else:
                CompletionRequest.model_validate({"prompt": "", **options})
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise ValueError(f"{self.__name__}(): sampling of output {output!r}: {field}: {first['msg']}.") from None
        return options


@overload
def function(function: Callable[..., Any], /) -> Function: ...


@overload
def function(
    *, outputs: Mapping[str, Sampling] | None = None, chat: bool = True, **sampling: Unpack[Sampling]
) -> Callable[[Callable[..., Any]], Function]: ...


def function(
    function: Callable[..., Any] | None = None,
    /,
    *,
    outputs: Mapping[str, Sampling] | None = None,
    chat: bool = True,
    **sampling: Unpack[Sampling],
) -> Function | Callable[[Callable[..., Any]], Function]:
    """Make a semantic function of a Python function whose docstring is the prompt.

    In the docstring, ``{{input:task}}`` stands for a parameter and ``{{output:code}}`` for what the model writes.
    Text after an output goes on in the same context, so that it may ask for another. Text after the last output is
    not sent. The function's body is not run.

    Args:
        function: When used without arguments, as ``@macaw.function``.
        outputs: Sampling of single outputs, by name.
        chat: Send a chat: what comes before an output is a message of the user, and ``{{role:system}}`` or
            ``{{role:assistant}}`` say otherwise. False: a text completion of the docstring as it stands.
        **sampling: For all outputs: the fields of `Sampling`.

    Raises:
        ValueError: The prompt is no template, or a field is not accepted; the message names function and variable.
    """
    if function is not None:
        return Function(function)
    return lambda f: Function(f, outputs=outputs, chat=chat, **sampling)


def _filled(
    turns: tuple[Turn, ...], values: Mapping[str, Text], made: Mapping[str, SemanticVariable]
) -> list[tuple[str, Text]]:
    """The prompt with arguments and earlier outputs in their places."""
    filled = []
    for role, pieces in turns:
        parts: list[str | SemanticVariable] = []
        for piece in pieces:
            if not isinstance(piece, Placeholder):
                parts.append(piece)
            elif piece.kind == "output":
                parts.append(made[piece.name])
            else:
                parts += values[piece.name]
        filled.append((role, Text(parts)))
    return filled


def _accepted(parameter: inspect.Parameter, name: str) -> inspect.Parameter:
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        raise ValueError(
            f"{name}() has a parameter {parameter}, which has no place of its own in the prompt. Give each input a "
            "name."
        )
    return parameter


def _output_mark(annotation: Any, function: Callable[..., Any]) -> Output | None:
    """The mark of an annotated output, also where ``from __future__ import annotations`` made it a string."""
    if isinstance(annotation, str) and "Output" in annotation:
        try:
            annotation = eval(annotation, function.__globals__)
        except NameError as error:
            raise ValueError(
                f"{function.__name__}(): annotation {annotation!r} cannot be evaluated: {error}. Import Output at the "
                "top of the module."
            ) from None
    if isinstance(annotation, type) and issubclass(annotation, Output):
        return annotation()
    return annotation if isinstance(annotation, Output) else None


def _name_of(function: Callable[..., Any]) -> str:
    if not inspect.isfunction(function):
        raise TypeError(f"@macaw.function goes on a Python function, not on {function!r}.")
    return function.__name__
