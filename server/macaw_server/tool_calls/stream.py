"""The calls in one answer, piece by piece: what is content, what is a call, and what may yet become one."""

from __future__ import annotations

from typing import NamedTuple

import regex

from .markers import num_partial
from .types import Arguments, CallBody, CallStart, Content, Piece, Schemas, ToolFormat


class Call(NamedTuple):
    """A call that has been read."""

    name: str
    arguments: str


class ToolCallStream:
    """Splits an answer into content and calls. However its text is cut, the same comes out.

    Held back are what may be the beginning of a call and the white space before it, which belongs to the markup where a
    call follows. What begins like a call and is none is content as it stands.

    Args:
        format: The model's.
        schemas: Of the request's functions.
        max_calls: The answer is over with so many.

    Attributes:
        num_calls: Calls that have begun.
        over: There are `max_calls`, complete; what follows is dropped.
    """

    def __init__(self, format: ToolFormat, schemas: Schemas, max_calls: int | None = None) -> None:
        self._format = format
        self._schemas = schemas
        self._max_calls = max_calls
        self._start = None if format.start is None else regex.compile(format.start)
        self._buffer = ""  # not yet used
        self._held = ""  # used, and content if no call follows
        self._body: CallBody | None = None
        self._at_start = True
        self._began = False
        self.num_calls = 0
        self.over = False

    @property
    def complete(self) -> bool:
        """There are calls, and the last is whole."""
        return self.num_calls > 0 and not self._began

    def add(self, text: str) -> list[Piece]:
        """The next text."""
        self._buffer += text
        return self._run(last=False)

    def end(self) -> list[Piece]:
        """The answer has ended: what was held back."""
        pieces = self._run(last=True)
        if not self.over and not self._began and self._held and not (self.num_calls and self._held.isspace()):
            pieces += _content(self._held)
        self._held = ""
        return merged(pieces)

    def _run(self, *, last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while not self.over:
            progress = self._in_text(pieces, last) if self._body is None else self._in_call(pieces, last)
            if not progress:
                break
        if self.over:
            self._buffer = self._held = ""
        return merged(pieces)

    def _in_text(self, pieces: list[Piece], last: bool) -> bool:
        """Pass on content up to a marker. Whether to go on."""
        if self._at_start and self._start is not None:
            match = self._start.match(self._buffer, partial=not last)
            if match is not None and match.partial:
                return False
            self._at_start = False
            if match is not None:
                self._open(self._buffer[: match.end()], match.end())
                return True
        found = self._buffer.find(self._format.begin)
        if found >= 0:
            self._pass_on(pieces, found)
            self._open(self._format.begin, len(self._format.begin))
            return True
        self._pass_on(pieces, len(self._buffer) - (0 if last else num_partial(self._buffer, self._format.begin)))
        return False

    def _in_call(self, pieces: list[Piece], last: bool) -> bool:
        assert self._body is not None
        taken = self._body.take(self._buffer, last=last)
        self._buffer = self._buffer[taken.num_chars :]
        for piece in taken.pieces:
            if isinstance(piece, CallStart):
                if self.num_calls == self._max_calls:
                    self.over, self._began = True, False
                    return False
                self.num_calls, self._began, self._held = self.num_calls + 1, True, ""
            pieces.append(piece)
        match taken.status:
            case "more":
                return False
            case "text":
                self._body = None
                if self._held:
                    held, self._held = self._held, ""
                    pieces += _content(held)
                return bool(self._buffer)
            case status:
                self._began, self._held = False, ""
                self._body = self._format.body(self._schemas) if status == "next" else None
                self.over = self.num_calls == self._max_calls
                return bool(self._buffer)

    def _open(self, markup: str, num_chars: int) -> None:
        self._held += markup
        self._buffer = self._buffer[num_chars:]
        self._body = self._format.body(self._schemas)

    def _pass_on(self, pieces: list[Piece], num_chars: int) -> None:
        """Content, but for the white space at its end."""
        text = self._held + self._buffer[:num_chars]
        self._buffer = self._buffer[num_chars:]
        content = text.rstrip()
        self._held = text[len(content) :]
        pieces += _content(content)


def parse(format: ToolFormat, schemas: Schemas, text: str) -> tuple[str, list[Call]]:
    """Content and calls of a whole answer."""
    stream = ToolCallStream(format, schemas)
    return collected([*stream.add(text), *stream.end()])


def collected(pieces: list[Piece]) -> tuple[str, list[Call]]:
    """Content and calls of all pieces of an answer."""
    content, calls = [], list[tuple[str, list[str]]]()
    for piece in pieces:
        match piece:
            case Content(text):
                content.append(text)
            case CallStart(name):
                calls.append((name, []))
            case Arguments(text):
                calls[-1][1].append(text)
    return "".join(content), [Call(name, "".join(arguments)) for name, arguments in calls]


def merged(pieces: list[Piece]) -> list[Piece]:
    """The same with neighbours of one kind as one."""
    joined: list[Piece] = []
    for piece in pieces:
        before = joined[-1] if joined else None
        if isinstance(before, Content) and isinstance(piece, Content):
            joined[-1] = Content(before.text + piece.text)
        elif isinstance(before, Arguments) and isinstance(piece, Arguments):
            joined[-1] = Arguments(before.text + piece.text)
        else:
            joined.append(piece)
    return joined


def _content(text: str) -> list[Piece]:
    return [Content(text)] if text else []
