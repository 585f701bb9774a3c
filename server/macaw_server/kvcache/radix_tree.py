"""Which pages hold which prefix: a radix tree over full pages, one root per tenant.

A page is found only by the exact tokens of everything up to its end, and by its salt. Edges are compressed: a node
holds a run of pages and is split at a page boundary where two prompts part. Declared text (`PublicPrefixes`) has a
root of its own, whose salt is `PUBLIC`, and below its nodes are those of the tenants: there, too, a child is found by
its salt and its tokens. So a path is public as far as its prompt is, then one tenant's, and nobody else gets past that.

(RadixAttention: Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", 2024,
section 3; pending pages are ours.)

Pages are **ready** or **pending**. A request puts the pages of its prompt into the tree before it computes
them, and is their owner until they are ready; whoever runs into pending pages knows whom to wait for. Pending
pages are the tail of a node that has no children and that nobody but the owner has locked, because nobody
gets past them.
"""

from __future__ import annotations

from collections.abc import Iterator

from macaw_server.kvcache.eviction import EvictionQueue, EvictionValue, least_recently_used
from macaw_server.kvcache.node import NO_USE, PUBLIC, Match, Node, PageKey, Use

__all__ = ["PUBLIC", "Match", "Node", "RadixTree"]


class RadixTree:
    """Prefixes by tokens; owns the pages it holds and hands them over when it evicts.

    Args:
        page_size: Tokens per page.
        eviction_value: The leaf with the smallest value is evicted first. A value that rises while its node
            rests is seen at the next eviction, one that falls when the node is next unlocked, or loses a claim.
    """

    def __init__(self, page_size: int, eviction_value: EvictionValue = least_recently_used) -> None:
        if page_size < 1:
            raise ValueError(f"A page of {page_size} tokens cannot hold one; use a page size of at least 1.")
        self.page_size = page_size
        self.num_pages = 0
        self.num_evictable = 0
        self._evictable = EvictionQueue(eviction_value)
        self._roots: dict[str | None, Node] = {}
        self._clock = 0

    # -- finding and holding ---------------------------------------------------------------------------------

    def match_prefix(self, tokens: list[int], salt: str, max_pages: int, num_public: int = 0) -> Match:
        """Find the longest prefix of at most `max_pages` full pages, pending ones included.

        Args:
            tokens: Of the prompt.
            salt: Whose.
            max_pages: See above.
            num_public: Pages from the front that are declared text: as many as there are.
        """
        root = PUBLIC if num_public else salt
        node, num_in_node = self._roots.get(root) or Node(root), 0
        pages: list[int] = []
        limit = min(max_pages, len(tokens) // self.page_size)
        while len(pages) < limit and num_in_node == len(node.pages):
            at = PUBLIC if len(pages) < num_public else salt
            child = node.children.get(self._key(at, tokens, len(pages)))
            if child is None:
                break
            num_in_node = self._common_pages(child, tokens, len(pages), limit)
            pages += child.pages[:num_in_node]
            node = child
        return Match(node, num_in_node, pages)

    def lock(self, match: Match, use: Use = NO_USE) -> Node:
        """Hold the path of a match whose pages are all ready; returns the node to give to `unlock`."""
        node = match.node
        assert match.num_in_node <= node.num_ready, f"{match.num_in_node} pages locked, {node.num_ready} are ready"
        if match.num_in_node < len(node.pages):
            node = self._split(node, match.num_in_node)
        for ancestor in self.path(node):
            if ancestor.lock_count == 0:
                self.num_evictable -= len(ancestor.pages)
            ancestor.lock_count += 1
            ancestor.num_users += 1
            ancestor.note(use)
            if ancestor.parent is None:
                self._roots.setdefault(ancestor.salt, ancestor)
        self.touch(node)
        return node

    def touch(self, node: Node) -> None:
        """Note a use of the path."""
        self._clock += 1
        for ancestor in self.path(node):
            ancestor.last_access = self._clock

    def forget(self, node: Node) -> None:
        """Take back that the caller has used the path, which it still holds."""
        for ancestor in self.path(node):
            ancestor.num_users -= 1

    def unlock(self, node: Node) -> None:
        """Let go of a path."""
        assert node.owner is None, f"node with {len(node.pages) - node.num_ready} pending pages let go"
        for ancestor in self.path(node):
            assert ancestor.lock_count > 0, f"node of {len(ancestor.pages)} pages unlocked more often than locked"
            ancestor.lock_count -= 1
            if ancestor.lock_count == 0:
                self.num_evictable += len(ancestor.pages)
                self._settle(ancestor)

    # -- claims ----------------------------------------------------------------------------------------------

    def end_of(self, match: Match) -> Node:
        """The node at which the ready part of a match ends; splits what reaches further."""
        num_pages = min(match.num_in_node, match.node.num_ready)
        if num_pages == len(match.node.pages):
            return match.node
        if num_pages:
            return self._split(match.node, num_pages)
        assert match.node.parent is not None
        return match.node.parent

    def claim(self, node: Node, steps: float) -> None:
        """Somebody will need the path in so many steps."""
        for ancestor in self.path(node):
            ancestor.claims[steps] = ancestor.claims.get(steps, 0) + 1

    def unclaim(self, node: Node, steps: float) -> None:
        """Take back a claim; what has been evicted meanwhile is nothing to do."""
        for ancestor in self.path(node):
            if ancestor.claims[steps] > 1:
                ancestor.claims[steps] -= 1
                continue
            del ancestor.claims[steps]
            self._evictable.worth_less(ancestor)

    # -- growing ---------------------------------------------------------------------------------------------

    def insert_pending(
        self, node: Node, salt: str | None, tokens: list[int], pages: list[int], owner: str, use: Use = NO_USE
    ) -> Node:
        """Add pages that `owner`, who has locked `node`, is about to compute; its lock moves to the result.

        Nothing is added (and `node` returned) when `pages` is empty or its first page is already there: the
        owner then keeps them to itself.
        """
        if not pages or self._key(salt, tokens, 0) in node.children:
            return node
        child = self._add_child(node, salt, tokens, pages, use, num_ready=0)
        child.owner, child.lock_count, child.last_access = owner, 1, node.last_access
        return child

    def set_ready(self, node: Node, num_ready: int) -> None:
        """Declare the first `num_ready` pages of a pending node computed."""
        assert node.num_ready <= num_ready <= len(node.pages), (
            f"{num_ready} pages ready after {node.num_ready}, of {len(node.pages)}"
        )
        node.num_ready = num_ready
        if num_ready == len(node.pages):
            node.owner = None

    def insert(
        self,
        node: Node,
        salt: str,
        tokens: list[int],
        pages: list[int],
        num_public: int = 0,
        use: Use = NO_USE,
    ) -> list[int]:
        """Add computed pages below `node`; returns those the tree has no use for, which stay the caller's.

        These are duplicates of pages that it holds, and all pages behind one that another request is
        computing. The first `num_public` pages are declared text.
        """
        unused: list[int] = []
        done = 0
        while done < len(pages):
            at, stop = (PUBLIC, min(num_public, len(pages))) if done < num_public else (salt, len(pages))
            child = node.children.get(self._key(at, tokens, done))
            if child is None:
                run = tokens[done * self.page_size : stop * self.page_size]
                child = self._add_child(node, at, run, pages[done:stop], use)
                self.num_evictable += len(child.pages)
                self.touch(child)
                done = stop
            else:
                common = self._common_pages(child, tokens, done, stop)
                if common > child.num_ready:
                    return unused + pages[done:]
                unused += pages[done : done + common]
                done += common
                if common < len(child.pages):
                    child = self._split(child, common)
                child.num_users += 1
                child.note(use)
            node = child
        self._settle(node)
        return unused

    def root(self, salt: str | None) -> Node:
        """The root of a namespace, made if need be."""
        return self._roots.setdefault(salt, Node(salt))

    # -- shrinking -------------------------------------------------------------------------------------------

    def drop_pending(self, node: Node) -> tuple[Node, list[int]]:
        """Take out what the owner of a node has not computed; returns what it still holds, and the pages."""
        if node.owner is None:
            return node, []
        assert node.lock_count == 1, f"pending node with {node.lock_count} locks"
        node.owner = None
        pages = self._cut(node, node.num_ready)
        if node.pages:
            return node, pages
        assert node.parent is not None
        return node.parent, pages

    def drop_unused(self, node: Node, num_kept: int) -> tuple[Node, list[int]]:
        """Take out the end of a path that the caller has locked and forgotten, as far as nobody else has used it.

        Args:
            node: End of the path, nothing pending.
            num_kept: Pages from the front of the path that stay in any case.

        Returns:
            What the caller still holds, and the pages.
        """
        dropped: list[int] = []
        start = sum(len(ancestor.pages) for ancestor in self.path(node))
        while node.lock_count == 1 and not (node.children or node.num_users or node.claims):
            start -= len(node.pages)
            stays = max(0, num_kept - start)
            if stays >= len(node.pages):
                break
            dropped += self._cut(node, stays)
            if stays:
                break
            assert node.parent is not None, "a root has no pages to drop"
            node = node.parent
        return node, dropped

    def evict(self, n: int) -> list[int]:
        """Take out up to `n` pages: smallest value first, a leaf from its end; O(log nodes) per leaf."""
        evicted: list[int] = []
        while len(evicted) < n and (node := self._evictable.pop()) is not None:
            pages = self._cut(node, max(0, len(node.pages) - (n - len(evicted))))
            self.num_evictable -= len(pages)
            evicted += pages
            self._settle(node)
        return evicted

    # -- looking ---------------------------------------------------------------------------------------------

    @staticmethod
    def path(node: Node) -> Iterator[Node]:
        """The node and its ancestors, root last."""
        at: Node | None = node
        while at is not None:
            yield at
            at = at.parent

    @property
    def salts(self) -> set[str | None]:
        """Namespaces that hold a page or a lock."""
        return set(self._roots)

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents first, roots included."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    # -- parts -----------------------------------------------------------------------------------------------

    def _key(self, salt: str | None, tokens: list[int], i_page: int) -> PageKey:
        return (salt, *tokens[i_page * self.page_size : (i_page + 1) * self.page_size])

    def _common_pages(self, child: Node, tokens: list[int], start: int, limit: int) -> int:
        """How many pages of `child` equal those of `tokens` from page `start` on; the first is known to.

        Bisecting leaves the comparison of tokens to list slices: linear in C, logarithmic in Python.
        """
        same, most, offset, size = (
            1,
            min(len(child.pages), limit - start),
            start * self.page_size,
            self.page_size,
        )
        while same < most:
            mid = (same + most + 1) // 2
            if child.tokens[same * size : mid * size] == tokens[offset + same * size : offset + mid * size]:
                same = mid
            else:
                most = mid - 1
        return same

    def _add_child(
        self,
        node: Node,
        salt: str | None,
        tokens: list[int],
        pages: list[int],
        use: Use,
        num_ready: int | None = None,
    ) -> Node:
        assert len(tokens) == len(pages) * self.page_size, f"{len(tokens)} tokens for {len(pages)} pages"
        assert node.salt in (PUBLIC, salt), f"a node of {salt!r} below one of {node.salt!r}"
        num_ready = len(pages) if num_ready is None else num_ready
        child = Node(salt, node, tokens, pages, num_ready, num_users=1)
        child.note(use)
        node.children[self._key(salt, tokens, 0)] = child
        self.num_pages += len(pages)
        self._clock += len(pages)
        return child

    def _split(self, node: Node, num_pages: int) -> Node:
        """Move the first pages of a node to a new parent and return that; whoever holds `node` holds both."""
        parent, cut = node.parent, num_pages * self.page_size
        assert parent is not None, "a root has no pages to split"
        assert 0 < num_pages <= node.num_ready, f"split at page {num_pages}, {node.num_ready} are ready"
        upper = Node(
            node.salt,
            parent,
            node.tokens[:cut],
            node.pages[:num_pages],
            num_pages,
            lock_count=node.lock_count,
            num_users=node.num_users,
            user=node.user,
            is_shared=node.is_shared,
            may_return=node.may_return,
            last_access=node.last_access,
            claims=dict(node.claims),
        )
        parent.children[self._key(node.salt, node.tokens, 0)] = upper
        node.parent, node.num_ready = upper, node.num_ready - num_pages
        del node.tokens[:cut], node.pages[:num_pages]
        upper.children[self._key(node.salt, node.tokens, 0)] = node
        return upper

    def _cut(self, node: Node, num_pages: int) -> list[int]:
        """Keep the first pages of a leaf and return the others; a leaf with none left goes."""
        pages = node.pages[num_pages:]
        self.num_pages -= len(pages)
        if num_pages == 0:
            assert node.parent is not None, "a root has no pages to cut"
            del node.parent.children[self._key(node.salt, node.tokens, 0)]
            self._settle(node.parent)
        del node.pages[num_pages:], node.tokens[num_pages * self.page_size :]
        node.num_ready = min(node.num_ready, num_pages)
        return pages

    def _settle(self, node: Node) -> None:
        """An unlocked node that has no children can be evicted; such a root is forgotten."""
        if node.lock_count or node.children:
            return
        if node.parent is None:
            self._roots.pop(node.salt, None)
        elif node.pages:
            self._evictable.push(node)
