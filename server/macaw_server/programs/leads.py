"""With what the prompts of a program begin: which part of one the calls to come have in common with it. Pure.

A prompt is a row of *atoms*: texts and variables, and in a chat the role of each message before its parts. Behind its
own last atom follows its answer; a prompt that quotes all of that goes on from its K/V.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from macaw.protocol import Call, ChatCompletionRequest, TextPart


class Atom(NamedTuple):
    """A part of a prompt: a text, a variable by its name, or the role of a message."""

    kind: Literal["text", "variable", "role"]
    value: str


class Lead(NamedTuple):
    """What a prompt has in common with one to come.

    Attributes:
        num_atoms: From the front, those of the answer included.
        steps: Calls from this one to that one.
    """

    num_atoms: int
    steps: int


def prompt_atoms(call: Call) -> list[Atom]:
    """The prompt of a call."""
    request = call.request
    if not isinstance(request, ChatCompletionRequest):
        return list(_atoms_of(request.parts))
    atoms = []
    for message in request.messages:
        atoms += [Atom("role", f"{message.role} {message.name or ''}"), *_atoms_of(message.parts)]
    return atoms


def answer_atoms(call: Call) -> list[Atom]:
    """What its answer adds, as another prompt would quote it."""
    role = [Atom("role", "assistant ")] if isinstance(call.request, ChatCompletionRequest) else []
    return [*role, Atom("variable", call.output)]


def _atoms_of(parts: Iterable[object]) -> Iterable[Atom]:
    for part in parts:
        yield Atom("text", part.text) if isinstance(part, TextPart) else Atom("variable", part.variable)  # type: ignore[attr-defined]


@dataclass(slots=True)
class _Node:
    """A beginning of prompts: how many to come have it, by depth of the call."""

    to_come: dict[int, int] = field(default_factory=dict)
    next: dict[Atom, _Node] = field(default_factory=dict)


class Leads:
    """A trie of the prompts that are to come; time per call is linear in its atoms."""

    def __init__(self) -> None:
        self._root = _Node()
        self._waiting: dict[str, tuple[list[Atom], int]] = {}

    def add(self, call: Call, depth: int) -> None:
        """A call is to come; `depth` are the calls before it."""
        atoms = prompt_atoms(call)
        self._waiting[call.id] = atoms, depth
        node = self._root
        for atom in atoms:
            node = node.next.setdefault(atom, _Node())
            node.to_come[depth] = node.to_come.get(depth, 0) + 1

    def remove(self, call_id: str) -> None:
        """It has come, or will not."""
        atoms, depth = self._waiting.pop(call_id, ((), 0))
        node = self._root
        for atom in atoms:
            parent, node = node, node.next[atom]
            node.to_come[depth] -= 1
            if not node.to_come[depth]:
                del node.to_come[depth]
            if not node.to_come:
                del parent.next[atom]  # nor has what follows
                return

    def of(self, call: Call, depth: int) -> list[Lead]:
        """What the prompt and the answer of a call have in common with those to come.

        The longest first; a shorter one only where a call needs it sooner.
        """
        found: list[Lead] = []
        node, num_atoms = self._root, 0
        for atom in (*prompt_atoms(call), *answer_atoms(call)):
            if atom not in node.next:
                break
            node, num_atoms = node.next[atom], num_atoms + 1
            lead = Lead(num_atoms, max(1, min(node.to_come) - depth))
            found = [other for other in found if other.steps < lead.steps]
            found.append(lead)
        return found[::-1]
