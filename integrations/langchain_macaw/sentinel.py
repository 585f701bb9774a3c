"""Values that are not known yet, and the stand-ins under which LangChain's own formatters run on them.

Lowering never re-implements a template engine. It gives the engine a `StandIn` in place of an answer that
does not exist yet, and afterwards looks where the stand-in went. A `StandIn` is a `str` that can be put into
other text, but refuses every question about its own: who asks would decide on a text that the model has not
written. What escapes that net (C code reads a `str` without calling its methods) shows when the same template
runs under stand-ins of another nonce and length: the pieces between them must be the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from langchain_core.messages import AIMessage

from macaw.protocol import TextPart, VariablePart

_START, _END = "\ue000", "\ue001"
MUSTACHE_ESCAPES = (("&", "&amp;"), ('"', "&quot;"), ("<", "&lt;"), (">", "&gt;"))
_WHOLE_ESCAPES = ("0", str(len(MUSTACHE_ESCAPES)))
ESCAPED_SUFFIX = ".html"
"""Ends the name of the variable that is another one's HTML-escaped text."""


def mustache_escape(text: str) -> str:
    """`text` as Mustache's ``{{variable}}`` writes it."""
    for character, entity in MUSTACHE_ESCAPES:
        text = text.replace(character, entity)
    return text


class NotStatic(Exception):  # noqa: N818  (a verdict on a template, not an error of the user's)
    """A prompt depends on an answer in a way that text parts and variable parts cannot express."""


class RendersRepr(NotStatic):
    """A prompt renders the repr of a message: legal, and hardly ever meant."""


@dataclass(frozen=True, slots=True)
class Variable:
    """Text that a call will produce."""

    name: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The message that a call will produce; `variable` is its text."""

    variable: Variable


@dataclass(frozen=True, slots=True, eq=False)
class Deferred:
    """A value that needs its variables to be built; under stand-ins it can be."""

    build: Callable[[StandIns], Any]


class Opaque:
    """A value that only native execution knows. Whatever a template asks of it, the answer is `NotStatic`."""


OPAQUE = Opaque()
_SYMBOLS = (Variable, Answer, Deferred, Opaque)


def is_symbolic(value: Any) -> bool:
    """Whether `value` is, or holds in dicts, lists or tuples, anything that is not known yet."""
    if isinstance(value, dict):
        return any(map(is_symbolic, value.values()))
    if isinstance(value, list | tuple):
        return any(map(is_symbolic, value))
    return isinstance(value, _SYMBOLS)


class StandIn(str):
    """The text of a variable as far as templates may see it: something to put into other text.

    It counts as non-empty, so that ``{% if answer %}`` and Mustache sections take the branch that an answer
    takes; a model that answers nothing makes the replay miss, which costs one request and changes no result.
    """

    __slots__ = ("escapes", "name", "nonce")
    nonce: str
    name: str
    escapes: int

    def __new__(cls, nonce: str, name: str, escapes: int = 0) -> StandIn:
        """A stand-in for variable `name` on which `escapes` of Mustache's escapes have been done."""
        self = super().__new__(cls, f"{_START}{nonce}:{name}:{escapes}{_END}")
        self.nonce, self.name, self.escapes = nonce, name, escapes
        return self

    def __format__(self, spec: str) -> str:
        return str(self) if not spec else _refuse(f"format spec {spec!r}")

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return _refuse("==") if isinstance(other, str) else False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def replace(self, old: str, new: str, count: Any = -1) -> StandIn:
        """Mustache escapes by four replacements in a row; that whole row is a transform, nothing else is."""
        if self.escapes == len(MUSTACHE_ESCAPES) or (old, new) != MUSTACHE_ESCAPES[self.escapes] or count != -1:
            _refuse("replace")
        return StandIn(self.nonce, self.name, self.escapes + 1)


class _Untouchable:
    """Stands in for an `Opaque` value; harmless where a template does not look at it."""

    def __getattr__(self, name: str) -> NoReturn:
        _refuse(name)


class _FutureMessage(AIMessage):
    """Stands in for an `Answer`: a message, but not its repr, which would hold the id of a run."""

    def __str__(self) -> str:
        return _refuse_repr()

    def __repr__(self) -> str:
        return _refuse_repr()

    def __format__(self, spec: str) -> str:
        return _refuse_repr()


def _refuse(what: str) -> NoReturn:
    raise NotStatic(f"The prompt asks for {what} of a text that a model has yet to write.")


def _refuse_repr() -> NoReturn:
    raise RendersRepr(
        "A prompt puts a whole AIMessage into text, which renders its Python repr. "
        "Put StrOutputParser() behind the model that wrote it."
    )


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: object, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(name.strip("_"))

    return method


_KEPT = {*vars(StandIn), *dir(object), "__getnewargs__"}
_QUESTIONS = {"__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__repr__", "__html__"}
for _name in {*dir(str)} - _KEPT | _QUESTIONS:
    setattr(StandIn, _name, _refusing(_name))
for _name in (
    "__str__",
    "__format__",
    "__repr__",
    "__iter__",
    "__len__",
    "__bool__",
    "__getitem__",
    "__call__",
    "__html__",
):
    setattr(_Untouchable, _name, _refusing(_name))


class StandIns:
    """One set of stand-ins: fills symbolic values in, and finds them again in rendered text.

    Args:
        nonce_len: Bytes of randomness; two sets of different length tell apart what depends on the text's
        length.
    """

    def __init__(self, nonce_len: int) -> None:
        # Mixed case, so that changing the case of text with a stand-in in it breaks the stand-in.
        self._nonce = "aZ" + secrets.token_hex(nonce_len)

    def fill(self, value: Any) -> Any:
        """`value` with stand-ins for everything that is not known yet."""
        match value:
            case Variable(name):
                return StandIn(self._nonce, name)
            case Answer(variable):
                return _FutureMessage(content=str(self.fill(variable)))
            case Deferred(build):
                return build(self)
            case Opaque():
                return _Untouchable()
            case dict():
                return {key: self.fill(item) for key, item in value.items()}
            case list():
                return [self.fill(item) for item in value]
            case tuple() if type(value) is tuple:
                return tuple(self.fill(item) for item in value)
        return value

    def split(self, text: str) -> tuple[TextPart | VariablePart, ...]:
        """Rendered text as parts.

        Raises:
            NotStatic: A stand-in went through something that is not Mustache's whole HTML escape.
        """
        # Not by a regular expression: compiling one for each nonce cost more than all the rest of a small plan.
        constant, *pieces = text.split(f"{_START}{self._nonce}:")
        parts: list[TextPart | VariablePart] = [TextPart(text=constant)] if constant else []
        for piece in pieces:
            inside, end, constant = piece.partition(_END)
            name, colon, escapes = inside.partition(":")
            if not (name and colon and end) or escapes not in _WHOLE_ESCAPES:
                _refuse("replace")
            parts.append(VariablePart(variable=name if escapes == "0" else name + ESCAPED_SUFFIX))
            if constant:
                parts.append(TextPart(text=constant))
        return tuple(parts)
