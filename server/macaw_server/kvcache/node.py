"""The nouns of the radix tree: a node, and what is found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

PageKey = tuple[str | int | None, ...]
"""A salt, and the tokens of one page."""
PUBLIC = None
"""The salt of declared text."""


class Use(NamedTuple):
    """Who uses a path.

    Attributes:
        program: Its program; None leaves no trace.
        may_return: Whether it is unknown what the program will ask next, and when it ends.
    """

    program: str | None
    may_return: bool


NO_USE = Use(None, False)


@dataclass(slots=True, eq=False)
class Node:
    """A run of pages below one parent.

    Attributes:
        salt: The tenant's namespace, or `PUBLIC`.
        parent: None for a root, which has no pages.
        tokens: Tokens of the run, ``len(pages) * page_size`` of them.
        pages: Page numbers, owned by the tree.
        num_ready: Pages from the front whose K/V is there for any chunk scheduled from now on.
        owner: The request that computes the rest; None when all are ready.
        children: By their salt, and the tokens of their first page.
        lock_count: Live requests whose path goes through here; the node stays while it is not 0.
        num_users: Requests whose path went through here, without those that were cancelled.
        user: The program that has used it last.
        is_shared: Whether several have.
        may_return: Whether one of them may, for all that is known, go on from here.
        last_access: Time of the last use, counted in pages that the tree has taken in since it is there.
        claims: How many need it in so many steps, by steps; see `Retention`.
        entry: Number and value of its valid entry in the `EvictionQueue`.
    """

    salt: str | None
    parent: Node | None = None
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_ready: int = 0
    owner: str | None = None
    children: dict[PageKey, Node] = field(default_factory=dict)
    lock_count: int = 0
    num_users: int = 0
    user: str | None = None
    is_shared: bool = False
    may_return: bool = False
    last_access: int = 0
    claims: dict[float, int] = field(default_factory=dict)
    entry: tuple[int, float] | None = None

    def note(self, use: Use) -> None:
        """Remember who uses it."""
        if use.program is not None:
            self.is_shared = self.is_shared or self.user not in (None, use.program)
            self.may_return = self.may_return or use.may_return
            self.user = use.program


class Match(NamedTuple):
    """The longest path for some tokens.

    Attributes:
        node: Where it ends; a root if nothing was found.
        num_in_node: How many of that node's pages belong to it.
        pages: All pages of the path.
    """

    node: Node
    num_in_node: int
    pages: list[int]

    @property
    def owner(self) -> str | None:
        """Whom to wait for: the request that still computes pages of the path, if any."""
        return self.node.owner if self.num_in_node > self.node.num_ready else None

    @property
    def ready(self) -> Match:
        """As much of it as nobody has to wait for."""
        num_ready, parent = min(self.num_in_node, self.node.num_ready), self.node.parent
        pages = self.pages[: len(self.pages) - self.num_in_node + num_ready]
        if num_ready == 0 and parent is not None:
            return Match(parent, len(parent.pages), pages)  # what has children is ready
        return Match(self.node, num_ready, pages)
