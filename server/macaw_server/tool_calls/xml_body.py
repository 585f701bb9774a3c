"""Calls whose arguments are tags: ``<function=NAME><parameter=KEY>VALUE</parameter></function>``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import regex

from .json_body import JsonBody, Tail
from .markers import num_partial
from .types import Arguments, CallStart, Piece, Schemas, Taken

_HEADER = regex.compile(r"\s*<function=(?P<name>[^>\s]{1,256})>")
_PARAMETER = regex.compile(r"\s*<parameter=(?P<key>[^>]{1,256})>")
_TAIL = Tail(r"\s*</function>\s*</tool_call>", r"\s*</function>")
_CLOSE = "</parameter>"


class XmlBody:
    """Arguments go out as JSON, each when it is there; their types are those of the schema.

    Args:
        schemas: Of the functions.
        json_body: Reads what is a JSON object instead, as a forced call is.
    """

    def __init__(self, schemas: Schemas, json_body: JsonBody) -> None:
        self._schemas = schemas
        self._json_body = json_body
        self._state: Literal["header", "json", "parameters", "value"] = "header"
        self._properties: Mapping[str, Any] = {}
        self._key = ""
        self._value: list[str] = []  # of the parameter that is being written
        self._num_parameters = 0

    def take(self, text: str, *, last: bool) -> Taken:
        """See `CallBody`."""
        if self._state == "header":
            self._state = "json" if text.lstrip()[:1] == "{" else "header"
        if self._state == "json":
            return self._json_body.take(text, last=last)
        pieces: list[Piece] = []
        position = 0
        if self._state == "header":
            match = _HEADER.match(text, partial=not last)
            if match is None or match.partial:
                return Taken([], 0, "text" if match is None else "more")
            properties = self._schemas.get(match["name"], {}).get("properties")
            self._properties = properties if isinstance(properties, dict) else {}
            pieces.append(CallStart(match["name"]))
            position, self._state = match.end(), "parameters"
        while True:
            if self._state == "parameters":
                match = _PARAMETER.match(text, position, partial=not last)
                if match is None:
                    break
                if match.partial:
                    return Taken(pieces, position, "more")
                self._key, position, self._state = match["key"], match.end(), "value"
            close = text.find(_CLOSE, position)
            if close < 0:
                used = len(text) if last else max(position, len(text) - num_partial(text, _CLOSE))
                self._value.append(text[position:used])
                return Taken(pieces, used, "more")
            self._value.append(text[position:close])
            pieces.append(self._argument())
            position, self._state = close + len(_CLOSE), "parameters"
        if last and position == len(text):
            return Taken(pieces, position, "more")  # cut off
        end = _TAIL.match(text, position, last=last)
        if end is None:
            return Taken(pieces, position, "more")
        pieces.append(Arguments("}" if self._num_parameters else "{}"))
        return Taken(pieces, end.position, end.status)

    def _argument(self) -> Arguments:
        """The parameter that is there."""
        key, raw = self._key, "".join(self._value).removeprefix("\n").removesuffix("\n")
        self._value.clear()
        opening = ", " if self._num_parameters else "{"
        self._num_parameters += 1
        value = _typed(raw, self._properties.get(key))
        return Arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: {value}")


def _typed(raw: str, schema: Any) -> str:
    """The JSON text of a value: of a string as it is, of anything else as JSON where it is that."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string":
        return json.dumps(raw, ensure_ascii=False)
    text = {"True": "true", "False": "false", "None": "null"}.get(raw.strip(), raw)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return json.dumps(raw, ensure_ascii=False)
    if isinstance(kind, list) and "string" in kind and not isinstance(value, dict | list | bool | None):
        return json.dumps(raw, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)
