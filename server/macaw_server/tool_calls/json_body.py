"""Calls whose arguments are a JSON object: read as they are written, character by character."""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

import regex

from .types import Arguments, CallStart, Piece, Taken

_STRUCTURE = regex.compile(r'["\\{}\[\]]')
_OBJECT = regex.compile(r'\s*\{\s*"(?:name|arguments|parameters|function|type|id)"\s*:')
"""What is not a call in the usual order of keys, but may be one in another."""

NAME = r'(?P<name>[^"\\\s]{1,256})'


class JsonSpan:
    """Finds the end of a JSON object or list in a stream of text, by its brackets and strings alone."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.closed = False

    def add(self, text: str, start: int = 0) -> int:
        """Read on from `start`; the index behind the last character that belongs to the value."""
        position = start
        if self._escaped and position < len(text):
            self._escaped, position = False, position + 1
        while (match := _STRUCTURE.search(text, position)) is not None:
            position = int(match.end())
            char = match[0]
            if char == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                if char == "\\":
                    self._escaped = position == len(text)
                    position += not self._escaped
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.closed = True
                    return position
        return len(text)


class TailEnd(NamedTuple):
    """Where a call's markup ends, and whether another call follows."""

    position: int
    status: Literal["end", "next"]


class Tail:
    """What closes a call, or as much of it as is there.

    Args:
        whole: Regular expression; its group `next`, if it has one, says that another call follows.
        loose: What counts where that does not come: a beginning of it, or nothing.
    """

    def __init__(self, whole: str, loose: str) -> None:
        self._whole = regex.compile(whole)
        self._loose = regex.compile(loose)

    def match(self, text: str, position: int, *, last: bool) -> TailEnd | None:
        """Its end; None where more text decides."""
        match = self._whole.match(text, position, partial=not last)
        if match is None:
            loose = self._loose.match(text, position)
            return TailEnd(position if loose is None else loose.end(), "end")
        if match.partial:
            return None
        return TailEnd(match.end(), "next" if match.groupdict().get("next") else "end")


class JsonBody:
    """``HEADER {arguments} TAIL``.

    Once the header has said the name, and that an object follows, it is a call whatever the object turns out to be:
    its text goes out as it comes, and is for the client to check. Before that nothing has gone out, and what is not a
    header is text. Where the keys come in another order, the whole object is read first.

    Args:
        header: Up to the arguments' brace, with the group `name`.
        tail: Behind the arguments; its group `next` says that another call follows.
        loose_tail: Instead, where that is not what comes; may match nothing.
        object_tail: As `tail`, behind a whole object; None where header, arguments and tail are not one.
    """

    def __init__(self, header: str, tail: str, loose_tail: str, object_tail: str | None = None) -> None:
        self._header = regex.compile(header)
        self._tail = Tail(tail, loose_tail)
        self._object_tail = None if object_tail is None else Tail(object_tail, "")
        self._state: Literal["header", "object", "arguments", "tail"] = "header"
        self._span = JsonSpan()
        self._num_scanned = 0

    def take(self, text: str, *, last: bool) -> Taken:
        """See `CallBody`."""
        pieces: list[Piece] = []
        position = 0
        if self._state == "header":
            match = self._header.match(text, partial=not last)
            if match is None:
                self._state = "object"
            elif match.partial:
                return Taken([], 0, "more")
            else:
                pieces.append(CallStart(match["name"]))
                position, self._state = match.end(), "arguments"
        if self._state == "object":
            status, call, position = self._whole_object(text, last)
            if call is None:
                return Taken([], 0, status)
            pieces += call
            self._state, self._tail = "tail", self._object_tail or self._tail
        if self._state == "arguments":
            start, position = position, self._span.add(text, position)
            if position > start:
                pieces.append(Arguments(text[start:position]))
            if not self._span.closed:
                return Taken(pieces, position, "more")
            self._state = "tail"
        end = self._tail.match(text, position, last=last)
        return Taken(pieces, position, "more") if end is None else Taken(pieces, end.position, end.status)

    def _whole_object(self, text: str, last: bool) -> tuple[Literal["more", "text"], list[Piece] | None, int]:
        """A call in an object whose keys are in another order: its pieces and its end."""
        match = None if self._object_tail is None else _OBJECT.match(text, partial=not last)
        if match is None:
            return "text", None, 0
        if match.partial:
            return "more", None, 0
        self._num_scanned = self._span.add(text, self._num_scanned)
        if not self._span.closed:
            return "more" if not last else "text", None, 0
        call = _call_of(text[: self._num_scanned])
        return "text", call, self._num_scanned


def _call_of(text: str) -> list[Piece] | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(function := call.get("function"), dict):
        call = function
    name = call.get("name", function)
    arguments = next((call[key] for key in ("arguments", "parameters") if key in call), None)
    if not isinstance(name, str) or not name:
        return None
    return None if (arguments_text := _object_text(arguments)) is None else [CallStart(name), Arguments(arguments_text)]


def _object_text(arguments: Any) -> str | None:
    """Arguments as the text of an object: they may be one, or its text, or missing."""
    if isinstance(arguments, str):
        try:
            return arguments if isinstance(json.loads(arguments), dict) else None
        except (ValueError, RecursionError):
            return None
    if arguments is None:
        return "{}"
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else None
