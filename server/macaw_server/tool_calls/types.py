"""The nouns of tool calling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

Schemas = Mapping[str, Mapping[str, Any]]
"""JSON schema of the arguments by name of the function."""


class Content(NamedTuple):
    """Text of the answer outside of calls."""

    text: str


class CallStart(NamedTuple):
    """A call begins."""

    name: str


class Arguments(NamedTuple):
    """JSON text: the next piece of the arguments of the call that began last."""

    text: str


Piece = Content | CallStart | Arguments


class Taken(NamedTuple):
    """What a `CallBody` made of a text.

    Attributes:
        pieces: What is sure by now.
        num_chars: So much of the text is used.
        status: `more`: needs more text than is left. `end`: the call is over, and its markup is used. `next`: the
            same, and another call follows without a marker. `text`: it was no call; nothing was used.
    """

    pieces: list[Piece]
    num_chars: int
    status: Literal["more", "end", "next", "text"]


class CallBody(Protocol):
    """Reads one call, or a list that is only known as a whole, from behind its marker to behind its end.

    It is made anew for each. What it does not use it is given again, with more behind it.
    """

    def take(self, text: str, *, last: bool) -> Taken:
        """Read on.

        Args:
            text: From the first character that was not used.
            last: Nothing comes behind it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Markup:
    """How a call is written, for a grammar: ``begin open prefix ARGUMENTS suffix (separator prefix ...)* close``.

    Attributes:
        begin: What the first call begins with, and nothing else; empty where a call is told by its first character.
        open: Behind it.
        prefix: Of one call; `{name}` stands for the function's.
        suffix: Of one call.
        separator: Between two.
        close: Behind the last.
        first_char: Where `begin` is empty: what no other answer starts with.
    """

    begin: str
    prefix: str
    suffix: str
    separator: str
    open: str = ""
    close: str = ""
    first_char: str = ""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls.

    Attributes:
        name: For `--tool-call-parser`.
        begin: Marker before a call, anywhere in an answer.
        body: Makes the reader of what comes behind it.
        signature: Regular expression of the call ``macaw_probe(macaw_argument="macaw_value")`` as the family's chat
            templates write it.
        markup: How calls are written that are forced.
        start: Regular expression of how an answer starts that is a call without a marker.
        markers: Texts in calls that may be special tokens.
        id_len: Templates accept only ids of this length.
    """

    name: str
    begin: str
    body: Callable[[Schemas], CallBody]
    signature: str
    markup: Markup
    start: str | None = None
    markers: tuple[str, ...] = ()
    id_len: int | None = None
