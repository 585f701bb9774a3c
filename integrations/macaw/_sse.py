"""Server-sent events: bytes in, events out, as the HTML standard (section 9.2.6) defines the format."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import NamedTuple

_LINE_END = re.compile(r"\r\n|\r|\n")  # not str.splitlines, which also splits on U+2028 and others


class ServerSentEvent(NamedTuple):
    """One event; `id` is the last id that the stream has set, "" before the first."""

    type: str
    data: str
    id: str


class SSEDecoder:
    """Incremental parser: chunks may end anywhere, also within a character or between CR and LF.

    An event that the stream's end cuts off is dropped, as the standard says: who reconnects gets it again.
    The `retry` field is not used: how long to wait is for the one who reconnects to say.
    """

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._line = ""
        self._after_cr = False
        self._type = ""
        self._data: list[str] = []
        self._id = ""

    def feed(self, chunk: bytes) -> Iterator[ServerSentEvent]:
        """Yield the events that this chunk completes; to be exhausted before the next chunk."""
        text = self._utf8.decode(chunk)
        if self._after_cr and text:
            text = text.removeprefix("\n")
            self._after_cr = False
        if not text:
            return
        self._after_cr = text.endswith("\r")
        lines = _LINE_END.split(text)
        lines[0] = self._line + lines[0]
        self._line = lines.pop()
        for line in lines:
            if line:
                self._field(line)
            elif (event := self._dispatch()) is not None:
                yield event

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._type = value
        elif name == "id" and "\0" not in value:
            self._id = value

    def _dispatch(self) -> ServerSentEvent | None:
        """End the event; one without data is none."""
        event = ServerSentEvent(self._type or "message", "\n".join(self._data), self._id) if self._data else None
        self._type, self._data = "", []
        return event
