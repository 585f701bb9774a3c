"""Transforms: the pure text functions that run on the server, between variables.

`compile_transform` does all checking that needs no input, so that a bad pattern or pointer is refused with
the program and never starts anything; what it returns takes time linear in its input (patterns run on RE2).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import re2

from macaw.protocol import JoinArgs, JsonPointerArgs, LinesArgs, RegexArgs, Transform

MAX_JOINED_CHARS = 2**24
"""More than any context holds; without it, joins of joins double their text with every step."""

TransformFn = Callable[[Sequence[str]], str]
"""Input values in the transform's order -> output value. Raises ValueError where it cannot be applied."""


class TransformArgsError(ValueError):
    """An argument can never work; `arg` is its name."""

    def __init__(self, arg: str, message: str) -> None:
        super().__init__(message)
        self.arg = arg


def compile_transform(transform: Transform) -> TransformFn:
    """Build the function that a transform stands for.

    Raises:
        TransformArgsError: The pattern, its group or the pointer is malformed.
    """
    args = transform.typed_args
    match args:
        case JoinArgs():
            return lambda values: _join(values, args)
        case JsonPointerArgs():
            return _json_pointer(args.pointer)
        case RegexArgs():
            return _regex(args)
        case LinesArgs():
            return lambda values: _lines(values[0], args)
    return _strip if transform.op == "strip" else _html_escape


def _strip(values: Sequence[str]) -> str:
    return values[0].strip()


def _html_escape(values: Sequence[str]) -> str:
    """As LangChain's mustache renderer escapes: ``& < > "``, and not the apostrophe."""
    return html.escape(values[0], quote=False).replace('"', "&quot;")


def _join(values: Sequence[str], args: JoinArgs) -> str:
    kept = [value for value in values if not args.drop_blank or value.strip()]
    if args.strip:
        kept = [value.strip() for value in kept]
    size = sum(map(len, kept)) + len(args.separator) * (len(kept) - 1)
    if size > MAX_JOINED_CHARS:
        raise ValueError(f"the joined text of {size:,} characters is over the limit of {MAX_JOINED_CHARS:,}")
    return args.separator.join(kept)


def _lines(value: str, args: LinesArgs) -> str:
    """Blank lines are dropped before the slice is taken: ``stop=3`` is the first three that say something."""
    lines = [line for line in value.splitlines() if not args.drop_blank or line.strip()]
    return "\n".join(lines[args.start : args.stop])


def _regex(args: RegexArgs) -> TransformFn:
    options = re2.Options()
    options.log_errors = False
    try:
        pattern = re2.compile(args.pattern, options)
    except re2.error as e:
        reason = e.args[0].decode() if e.args and isinstance(e.args[0], bytes) else str(e)
        raise TransformArgsError(
            "pattern",
            f"Pattern {args.pattern!r} is not a regular expression that RE2 accepts: {reason}. RE2 has no "
            "look-around and no backreferences; see https://github.com/google/re2/wiki/Syntax.",
        ) from e
    if args.group > pattern.groups:
        raise TransformArgsError(
            "group",
            f"Group {args.group} of pattern {args.pattern!r}, which has groups 0 to {pattern.groups}.",
        )

    def search(values: Sequence[str]) -> str:
        found = pattern.search(values[0])
        if found is None:
            raise ValueError(f"no match for pattern {args.pattern!r} in {_preview(values[0])}")
        group: str | None = found.group(args.group)
        if group is None:
            raise ValueError(f"group {args.group} of pattern {args.pattern!r} took no part in the match")
        return group

    return search


def _json_pointer(pointer: str) -> TransformFn:
    """RFC 6901. A string is taken as it is, anything else as compact JSON."""
    if pointer and not pointer.startswith("/"):
        raise TransformArgsError("pointer", f"Pointer {pointer!r} must be empty (the whole value) or start with '/'.")
    if re.search(r"~(?![01])", pointer):
        raise TransformArgsError("pointer", f"Pointer {pointer!r} has a bare '~': write '~0' for '~', '~1' for '/'.")
    keys = [key.replace("~1", "/").replace("~0", "~") for key in pointer.split("/")[1:]]

    def look_up(values: Sequence[str]) -> str:
        try:
            value = json.loads(values[0], parse_constant=_refuse_constant)
            for depth, key in enumerate(keys):
                value = _child(value, key, at="/".join(pointer.split("/")[: depth + 1]))
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
            text.encode()
        except json.JSONDecodeError as e:
            raise ValueError(f"not JSON ({e}): {_preview(values[0])}") from e
        except RecursionError as e:
            raise ValueError("JSON is nested too deeply") from e
        except UnicodeEncodeError as e:
            raise ValueError(f"the value at {pointer!r} holds half a surrogate pair") from e
        return text

    return look_up


def _child(value: Any, key: str, at: str) -> Any:
    match value:
        case dict() if key in value:
            return value[key]
        case dict():
            raise ValueError(f"no key {key!r} at {at!r}; its keys are {_preview(', '.join(map(repr, value)))}")
        case list() if re.fullmatch(r"0|[1-9][0-9]{0,17}", key) and int(key) < len(value):
            return value[int(key)]
        case list():
            raise ValueError(f"no index {key!r} at {at!r}; it is an array of {len(value)}")
    raise ValueError(f"no {key!r} at {at!r}: the value there is neither an object nor an array")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _preview(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
