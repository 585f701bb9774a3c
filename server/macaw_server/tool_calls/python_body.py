"""Calls as a Python list: ``[f(a=1), g(b="x")]``."""

from __future__ import annotations

import ast
import json
from typing import Any

import regex

from .json_body import JsonBody, Tail
from .types import Arguments, CallStart, Piece, Taken

_STRUCTURE = regex.compile(r"""["'\\\[\](){}]""")
_TAIL = Tail(r"\s*<\|python_end\|>", "")


class PythonBody:
    """Read as a whole: its calls go out when the list is closed. No code is run: values are literals.

    Args:
        json_body: Reads what is a JSON object instead, as a forced call is.
    """

    def __init__(self, json_body: JsonBody) -> None:
        self._json_body = json_body
        self._is_json = False
        self._position = 0
        self._depth = 0
        self._quote = ""

    def take(self, text: str, *, last: bool) -> Taken:
        """See `CallBody`."""
        first = text.lstrip()[:1]
        if self._is_json or first == "{":
            self._is_json = True
            return self._json_body.take(text, last=last)
        if first not in ("", "["):
            return Taken([], 0, "text")
        if not (self._position and self._depth == 0) and not self._closed(text):
            return Taken([], 0, "text" if last else "more")
        pieces = _calls_of(text[: self._position].strip())
        if pieces is None:
            return Taken([], 0, "text")
        end = _TAIL.match(text, self._position, last=last)
        return Taken([], 0, "more") if end is None else Taken(pieces, end.position, end.status)

    def _closed(self, text: str) -> bool:
        """Scan on to the end of the list."""
        while (match := _STRUCTURE.search(text, self._position)) is not None:
            char = match[0]
            if char == "\\":
                if match.end() == len(text):
                    return False
                self._position = match.end() + 1
                continue
            self._position = match.end()
            if char in "\"'":
                self._quote = "" if char == self._quote else self._quote or char
            elif not self._quote:
                self._depth += 1 if char in "[({" else -1
                if self._depth == 0:
                    return True
        self._position = len(text)
        return False


def _calls_of(text: str) -> list[Piece] | None:
    """The calls in a list, or None where it is something else."""
    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        pieces: list[Piece] = []
        for element in tree.elts:
            if not isinstance(element, ast.Call) or element.args:
                return None
            arguments = {_key(keyword): ast.literal_eval(keyword.value) for keyword in element.keywords}
            pieces += [CallStart(ast.unparse(element.func)), Arguments(_json(arguments))]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return pieces


def _key(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("** has no name")
    return keyword.arg


def _json(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)
