"""Programs in plain Python: calls and transforms take and return references to semantic variables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from macaw.protocol import (
    Call,
    ChatCompletionRequest,
    CompletionRequest,
    Message,
    ProgramGrowth,
    ProgramRequest,
    Target,
    TextPart,
    Transform,
    TransformOp,
    Variable,
    VariablePart,
)


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to a semantic variable, for prompts, transforms and targets. It has no text yet."""

    name: str

    def __str__(self) -> str:
        raise TypeError(
            f"The value of variable {self.name!r} is not known yet, so it cannot be put into a string. "
            "Pass the reference beside the text: chat('Summarise: ', ref), not chat(f'Summarise: {ref}')."
        )

    def __format__(self, spec: str) -> str:
        return str(self)


Text = str | Ref | Sequence[str | Ref]
"""Text with variables in it; its parts are put together without a separator."""


class ProgramBuilder:
    r"""Collects a program.

    The name of a call or a transform is its id and its output's name; where none is given, one is made up. An
    option that does not exist raises pydantic's ValidationError at once; the graph is checked by the server.
    `model` is for calls without one of their own.

    Example:
        >>> b = ProgramBuilder()
        >>> notes = [b.chat("Summarise:\n", text, max_tokens=50) for text in ("first text", "second text")]
        >>> b.target(b.chat("Combine:\n", b.join(notes, separator="\n"), max_tokens=50, name="final"))
        >>> [call.id for call in b.build().calls]
        ['chat-0', 'chat-1', 'final']
    """

    def __init__(self, model: str | None = None) -> None:
        self._model = model
        self._names: set[str] = set()
        self._numbers: defaultdict[str, count[int]] = defaultdict(count)
        self._whole = ProgramGrowth()
        self._new = ProgramGrowth()

    def variable(self, name: str | None = None, *, value: str) -> Ref:
        """A text that is known now. What only one prompt uses may as well stand in that prompt."""
        return self._add_variable(name, Variable(value=value))

    def external(self, name: str | None = None) -> Ref:
        """A text that the client sets later, by `MacawClient.set_variable`."""
        return self._add_variable(name, Variable(external=True))

    def chat(self, *prompt: str | Ref, system: Text | None = None, name: str | None = None, **options: Any) -> Ref:
        """A chat completion of one user message, behind a system message if there is one; see `call`."""
        first = [] if system is None else [{"role": "system", "content": system}]
        return self.call([*first, {"role": "user", "content": prompt}], name=name, **options)

    def call(self, messages: Sequence[Mapping[str, Any]], *, name: str | None = None, **options: Any) -> Ref:
        """A chat completion.

        Args:
            messages: OpenAI's, with `Text` as `content`; an assistant's with `tool_calls` may have none.
            name: Of the call and its output.
            **options: Other fields of OpenAI's request, such as `max_tokens` and `temperature`.
        """
        typed = [Message(**{**message, "content": _content(message.get("content"))}) for message in messages]
        return self._add_call(self._pick_name(name, "chat"), ChatCompletionRequest(messages=typed, **options))

    def complete(self, *prompt: str | Ref, name: str | None = None, **options: Any) -> Ref:
        """A text completion, without a chat template; see `call`."""
        request = CompletionRequest(prompt=_parts(prompt), **options)
        return self._add_call(self._pick_name(name, "completion"), request)

    def join(self, refs: Iterable[Ref], *, name: str | None = None, **args: Any) -> Ref:
        """The texts in order, with `separator` between; `args` are the fields of `JoinArgs`."""
        return self.transform("join", *refs, name=name, **args)

    def transform(self, op: TransformOp, *refs: Ref, name: str | None = None, **args: Any) -> Ref:
        """A text function on the server; `args` are the fields of its type, such as `RegexArgs`."""
        name = self._pick_name(name, op)
        inputs = [ref.name for ref in refs]
        self._add("transforms", Transform(id=name, op=op, inputs=inputs, output=name, args=args))
        return Ref(name)

    def target(self, ref: Ref, **options: Any) -> None:
        """Wait for a variable; `options` are the fields of `Target`: `objective` and `deadline_ms`."""
        self._add("targets", Target(variable=ref.name, **options))

    def build(self, **options: Any) -> ProgramRequest:
        """The whole program so far; `options` are other fields of `ProgramRequest`, such as `open`."""
        self._new = ProgramGrowth()
        graph = {kind: getattr(self._whole, kind) for kind in ("variables", "calls", "transforms", "targets")}
        return ProgramRequest(model=self._model, **graph, **options)

    def growth(self, *, close: bool = False) -> ProgramGrowth:
        """What was added since the last `build` or `growth`, for `MacawClient.grow`."""
        growth, self._new = self._new, ProgramGrowth()
        return growth.model_copy(update={"close": close})

    def _pick_name(self, name: str | None, stem: str) -> str:
        if name is None:
            name = next(n for i in self._numbers[stem] if (n := f"{stem}-{i}") not in self._names)
        elif name in self._names:
            raise ValueError(f"The name {name!r} is already used in this program. Choose another.")
        self._names.add(name)
        return name

    def _add_variable(self, name: str | None, variable: Variable) -> Ref:
        name = self._pick_name(name, "external" if variable.external else "variable")
        self._whole.variables[name] = self._new.variables[name] = variable
        return Ref(name)

    def _add_call(self, name: str, request: ChatCompletionRequest | CompletionRequest) -> Ref:
        self._add("calls", Call(id=name, output=name, request=request))
        return Ref(name)

    def _add(self, kind: str, item: Call | Transform | Target) -> None:
        for graph in (self._whole, self._new):
            getattr(graph, kind).append(item)


def _content(text: Text | None) -> list[TextPart | VariablePart] | None:
    return None if text is None else _parts(text)


def _parts(text: Text) -> list[TextPart | VariablePart]:
    parts = [text] if isinstance(text, str | Ref) else text
    return [VariablePart(variable=p.name) if isinstance(p, Ref) else TextPart(text=p) for p in parts]
