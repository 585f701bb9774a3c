"""Grammars of calls, in llguidance's variant of Lark, in the form that the model was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .types import Markup

_SPACE = r" \t\r\n"


@dataclass(frozen=True, slots=True)
class CallRules:
    """What an answer may be.

    Attributes:
        schemas: JSON schema, with llguidance's options in it, of the arguments of each function that may be called.
        several: More than one call.
        free: Text instead of calls, or before them.
        content: JSON schema of what may be there instead of calls; `free` is then without meaning.
    """

    schemas: Mapping[str, Mapping[str, Any]]
    several: bool
    free: bool = False
    content: Mapping[str, Any] | None = None


def lark(markup: Markup, rules: CallRules, special: Mapping[str, int]) -> str:
    """The grammar.

    Args:
        markup: Of the model's family.
        rules: What may be called.
        special: Ids of those of the family's markers that are special tokens, which no text of a grammar matches.
    """
    names = list(rules.schemas)
    again = f" ({_literal(markup.separator, special)} call)*" if rules.several else ""
    rest = f"{_literal(markup.open, special)} call{again} {_literal(markup.close, special)}"
    lines = [
        "call: " + " | ".join(f"call_{i}" for i in range(len(names))),
        f"rest: {rest}",
    ]
    for i, name in enumerate(names):
        prefix = _literal(markup.prefix.replace("{name}", name), special)
        lines.append(f"call_{i}: {prefix} arguments_{i} {_literal(markup.suffix, special)}")
        lines.append(f"arguments_{i}: %json {_compact(rules.schemas[name])}")
    begin = _literal(markup.begin, special)
    if rules.content is not None:
        lines += [f"start: {begin} rest | content", f"content: %json {_compact(rules.content)}"]
    elif not rules.free:
        lines.append(f"start: {begin} rest")
    elif not markup.begin:
        char = re.escape(markup.first_char)
        lines += ["start: rest | TEXT", rf"TEXT: /([{_SPACE}]*[^{char}{_SPACE}](.|\n)*)?/"]
    elif markup.begin in special:
        lines += [f"start: TEXT | TEXT {begin} rest", r"TEXT: /(.|\n)*/"]
    else:
        lines += ["start: TEXT | trigger rest", f"trigger[lazy]: TEXT {begin}", r"TEXT: /(.|\n)*/"]
    return "\n".join(lines) + "\n"


def _literal(text: str, special: Mapping[str, int]) -> str:
    """A text as terms of a rule, special tokens by their ids."""
    if not text:
        return ""
    if not special:
        return json.dumps(text)
    pieces: Sequence[str] = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
    return " ".join(f"<[{special[p]}]>" if p in special else json.dumps(p) for p in pieces if p)


def _compact(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
