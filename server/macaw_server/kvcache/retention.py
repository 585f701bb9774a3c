"""Who is known to need which prefix, and how soon: claims, which only say what goes last when pages run out. Pure."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from macaw_server.kvcache.node import Node
from macaw_server.kvcache.radix_tree import RadixTree


class _Claim(NamedTuple):
    """On the path to a node, as of the holder's call `number`; `steps` is None when it is done with."""

    number: int
    steps: float | None


class Retention:
    """Claims by holder: a program with calls to come, or a request that waits.

    A holder has one claim on a path, the one of its latest call that says something of it; so calls that end in another
    order than they came bring nothing back. A claim on what is evicted all the same is no more than a note until its
    holder lets go.

    Args:
        tree: Of a cache.
    """

    def __init__(self, tree: RadixTree) -> None:
        self._tree = tree
        self._claims: dict[str, dict[Node, _Claim]] = {}

    @property
    def num_claims(self) -> int:
        """Those that count; linear in all of them, for tests."""
        return sum(claim.steps is not None for claims in self._claims.values() for claim in claims.values())

    def claim(self, holder: str, node: Node, steps: float, number: int = 0) -> None:
        """Note that a holder will need the path to a node.

        Args:
            holder: Who; it has to `let_go` in the end.
            node: End of the path; a root is nothing.
            steps: Calls until then: 0 is one that waits.
            number: Of the holder's call that says so; later ones have larger numbers.
        """
        claims = self._claims.setdefault(holder, {})
        old = claims.get(node)
        if node.parent is not None and (old is None or old.number <= number):
            claims[node] = _Claim(number, steps)
            self._tree.claim(node, steps)
            if old is not None and old.steps is not None:
                self._tree.unclaim(node, old.steps)

    def fulfil(self, holder: str, node: Node, number: int) -> None:
        """A call of the holder has got the path: what calls before it said of that is done with."""
        claims = self._claims.get(holder)
        if not claims:
            return
        for ancestor in [ancestor for ancestor in self._tree.path(node) if ancestor in claims]:
            old = claims[ancestor]
            if old.number < number:
                claims[ancestor] = _Claim(number, None)
                if old.steps is not None:
                    self._tree.unclaim(ancestor, old.steps)

    def let_go(self, holder: str) -> None:
        """Forget all that a holder has claimed."""
        for node, claim in self._claims.pop(holder, {}).items():
            if claim.steps is not None:
                self._tree.unclaim(node, claim.steps)

    def check(self) -> None:
        """Assert that nodes count the claims that there are; for tests."""
        counts: dict[Node, Counter[float]] = {}
        for claims in self._claims.values():
            for node, claim in claims.items():
                if claim.steps is not None:
                    for ancestor in self._tree.path(node):
                        counts.setdefault(ancestor, Counter())[claim.steps] += 1
        for node in self._tree.nodes():
            expected = counts.get(node, Counter())
            assert node.claims == expected, f"{node.claims} claims on {len(node.pages)} pages, held are {expected}"
