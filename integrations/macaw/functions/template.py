"""A docstring as a prompt: constant text, inputs, outputs and chat roles."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

_PLACEHOLDER = re.compile(r"\{\{\s*(?:(\w+)\s*:\s*)?([^\W\d]\w*)\s*\}\}")
_ROLES = ("system", "user", "assistant")


class Placeholder(NamedTuple):
    """``{{kind:name}}`` in a prompt."""

    kind: Literal["input", "output", "role"]
    name: str


Piece = str | Placeholder


class Turn(NamedTuple):
    """A chat message in the making."""

    role: str
    pieces: tuple[Piece, ...]


class Template:
    """A parsed prompt.

    Args:
        text: With ``{{input:name}}``, ``{{output:name}}`` and ``{{role:name}}``; a plain ``{{name}}`` is a parameter.
        parameters: Names that the caller gives a value to.
        output_parameters: Parameters that stand for outputs, as in Parrot's later syntax.
        chat: Whether the prompts are chat messages, or one text that the model continues.

    Attributes:
        outputs: Names, in the order of the text.
        prompts: For every output what comes before it: messages, or for a text one turn without a role.

    Raises:
        ValueError: The text is no such template; the message says where and what is accepted.
    """

    def __init__(
        self, text: str, *, parameters: Sequence[str], output_parameters: Collection[str] = (), chat: bool = True
    ) -> None:
        pieces = _parse(text, parameters, output_parameters)
        self.outputs = [p.name for p in pieces if isinstance(p, Placeholder) and p.kind == "output"]
        _check_use(pieces, self.outputs, parameters, output_parameters)
        self.prompts: dict[str, tuple[Turn, ...]] = _chat(pieces) if chat else _text(pieces)


def _parse(text: str, parameters: Sequence[str], output_parameters: Collection[str]) -> list[Piece]:
    pieces: list[Piece] = []
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        pieces += [text[end : match.start()]] if match.start() > end else []
        pieces.append(_placeholder(match, parameters, output_parameters))
        end = match.end()
    return pieces + ([text[end:]] if end < len(text) else [])


def _placeholder(match: re.Match[str], parameters: Sequence[str], output_parameters: Collection[str]) -> Placeholder:
    kind, name = match.groups()
    if kind is None:
        kind = "output" if name in output_parameters else "input"
    if kind == "input" and name not in parameters:
        close = difflib.get_close_matches(name, parameters, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Add the parameter, or write {{output:...}} for an output."
        raise ValueError(f"{match[0]} is no parameter; there are: {', '.join(parameters) or 'none'}. {hint}")
    if kind == "output" and name in parameters:
        raise ValueError(f"{match[0]} is also a parameter. An output gets its value from the model: rename one.")
    if kind == "role" and name not in _ROLES:
        raise ValueError(f"{match[0]} is no role. Roles are {', '.join(_ROLES)}.")
    if kind not in ("input", "output", "role"):
        raise ValueError(
            f"{match[0]} is no placeholder. Accepted are {{{{input:{name}}}}}, {{{{output:{name}}}}} and "
            "{{role:user}}; text that has to look like one can be passed as an argument."
        )
    return Placeholder(kind, name)  # type: ignore[arg-type]


def _check_use(
    pieces: list[Piece], outputs: list[str], parameters: Sequence[str], output_parameters: Collection[str]
) -> None:
    if not outputs:
        raise ValueError("The prompt has no output, so there is nothing to ask the model for. Add {{output:answer}}.")
    for name in outputs:
        if outputs.count(name) > 1:
            raise ValueError(f"{{{{output:{name}}}}} comes twice. An output is written once: give each its own name.")
    used = {p.name for p in pieces if isinstance(p, Placeholder)}
    for name in (*parameters, *output_parameters):
        if name not in used:
            raise ValueError(f"Parameter {name!r} is not in the prompt. Use it as {{{{input:{name}}}}}, or drop it.")


def _text(pieces: list[Piece]) -> dict[str, tuple[Turn, ...]]:
    """The prompt of an output is everything before it. What comes after the last one is not sent."""
    prompts: dict[str, tuple[Turn, ...]] = {}
    for i, piece in enumerate(pieces):
        if not isinstance(piece, Placeholder):
            continue
        if piece.kind == "role":
            raise ValueError(f"{{{{role:{piece.name}}}}} needs chat=True: a text completion has no roles.")
        if piece.kind == "output":
            if i == 0:
                raise ValueError(f"Nothing comes before {{{{output:{piece.name}}}}}. Write the prompt in front of it.")
            prompts[piece.name] = (Turn("", tuple(pieces[:i])),)
    return prompts


def _chat(pieces: list[Piece]) -> dict[str, tuple[Turn, ...]]:
    """An output is the assistant's turn; text is the user's, unless a role says otherwise."""
    prompts: dict[str, tuple[Turn, ...]] = {}
    turns: list[Turn] = []
    role, content = "user", list[Piece]()
    for piece in pieces:
        if isinstance(piece, str) or piece.kind == "input":
            content.append(piece)
            continue
        begun = _stripped(content)
        content = []
        if begun:
            turns.append(Turn(role, begun))
        if piece.kind == "role":
            role = piece.name
            continue
        if not turns or turns[-1].role == "assistant":
            raise ValueError(
                f"{{{{output:{piece.name}}}}} answers nothing: in a chat a message of the user comes before each "
                "output. Write text in front of it, or use chat=False to go on from text as it stands."
            )
        prompts[piece.name] = tuple(turns)
        turns.append(Turn("assistant", (piece,)))
        role = "user"
    return prompts


def _stripped(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Constant text without white space at the message's ends; what a caller passes in stays as it is."""
    pieces = list(pieces)
    if pieces and isinstance(pieces[0], str):
        pieces[0] = pieces[0].lstrip()
    if pieces and isinstance(pieces[-1], str):
        pieces[-1] = pieces[-1].rstrip()
    return tuple(piece for piece in pieces if piece)
