"""Calls of one choice as OpenAI writes them, in pieces and whole."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from macaw_server.service.tools import ToolUse
from macaw_server.tool_calls import Arguments, CallStart, Content, Piece


class Delta(NamedTuple):
    """New content, and the pieces of calls that came with it."""

    text: str
    calls: list[dict[str, Any]]


class ChoiceCalls:
    """Reads the calls in one choice.

    Attributes:
        calls: Those that have begun, as a message has them.
    """

    def __init__(self, tools: ToolUse) -> None:
        self._reader = tools.reader()
        self.calls: list[dict[str, Any]] = []

    @property
    def over(self) -> bool:
        """The answer has all calls that it may have."""
        return self._reader.over

    @property
    def complete(self) -> bool:
        """There are calls, and the last is whole."""
        return self._reader.complete

    def add(self, text: str, *, last: bool) -> Delta:
        """The next text of the choice."""
        return self._delta([*self._reader.add(text), *(self._reader.end() if last else ())])

    def _delta(self, pieces: Sequence[Piece]) -> Delta:
        text, calls = "", list[dict[str, Any]]()
        for piece in pieces:
            match piece:
                case Content(new):
                    text += new
                case CallStart(name):
                    call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
                    self.calls.append(call | {"function": {"name": name, "arguments": ""}})
                    calls.append({"index": len(self.calls) - 1, **call, "function": {"name": name, "arguments": ""}})
                case Arguments(new):
                    index = len(self.calls) - 1
                    self.calls[index]["function"]["arguments"] += new
                    if not calls or calls[-1]["index"] != index:
                        calls.append({"index": index, "function": {"arguments": ""}})
                    calls[-1]["function"]["arguments"] += new
        return Delta(text, calls)
