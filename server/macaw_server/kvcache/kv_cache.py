"""The KV cache as the scheduler sees it: pages per request, on top of the page pool and the radix tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from macaw_server.kvcache.eviction import by_value, least_recently_used
from macaw_server.kvcache.node import NO_USE, PUBLIC, Node, Use
from macaw_server.kvcache.page_pool import PagePool
from macaw_server.kvcache.public import PublicPrefixes
from macaw_server.kvcache.radix_tree import RadixTree
from macaw_server.kvcache.retention import Retention

Eviction = Literal["value", "lru"]


@dataclass(slots=True, eq=False)
class Allocation:
    """The pages of one live request.

    Attributes:
        request_id: Whose.
        block_table: Its pages in order. The first `num_tree_pages` are the tree's, held by a lock; the
            request owns the others.
        num_computed: Tokens from the front whose K/V is there, cached or scheduled.
        num_cached: Tokens found in the cache at admission.
        num_tree_pages: See `block_table`.
        node: End of the locked path.
        use: Who uses them.
        salt: Of its pages behind the first `num_public`.
        num_public: Pages from the front of its prompt that are declared text.
        later: Tokens of full pages that get into the tree when the declared text before them is computed.
    """

    request_id: str
    block_table: list[int]
    num_computed: int
    num_cached: int
    num_tree_pages: int
    node: Node
    use: Use
    salt: str
    num_public: int
    later: list[int]


class Blocked(NamedTuple):
    """A request that would compute what another one is computing.

    Attributes:
        owner: The request to wait for.
        num_pages: Pages of the shared prefix; admission makes sense when the owner has computed so many.
    """

    owner: str
    num_pages: int


class KVCache:
    """Gives pages to requests and keeps what they computed.

    Every page is free, or in the tree, or owned by one live request. A page counts as ready from the moment
    at which the chunk that ends it is scheduled: a step stores all K/V of its batch in a layer before that
    layer's attention runs, so later chunks of the same batch may read it. The caller runs every batch it has
    scheduled; if a batch fails on the way, the contents of the pages are unknown, and the cache has to be
    made anew.

    Without single flight a page counts as ready only when its step is over (`step_ended`), and nobody waits for pending
    ones: whoever needs them earlier computes them, too, into pages of its own.

    Args:
        num_pages: Pages in the pool.
        page_size: Tokens per page.
        public_prefixes: Tokens of the texts that the operator has declared public; their pages are found by all
            tenants.
        eviction: Order in which cached pages go when others are needed: by ``value``, or the least recently used.
        prefix_caching: Whether anything is kept and found at all; else each request has its pages for itself.
        single_flight: Whether a prefix that several need is computed once while they wait.

    Attributes:
        retention: Claims on prefixes; None where recency is all that counts, or nothing is kept.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        public_prefixes: Sequence[Sequence[int]] = (),
        eviction: Eviction = "value",
        *,
        prefix_caching: bool = True,
        single_flight: bool = True,
    ) -> None:
        self.page_size = page_size
        self._prefix_caching = prefix_caching
        self._single_flight = single_flight
        self.public = PublicPrefixes(public_prefixes, page_size)
        self.pool = PagePool(num_pages)
        self.tree = RadixTree(page_size, by_value(num_pages) if eviction == "value" else least_recently_used)
        self.retention = Retention(self.tree) if eviction == "value" and prefix_caching else None
        self.num_evicted = 0
        self._live: dict[str, Allocation] = {}

    @property
    def num_pages(self) -> int:
        """Pages there are."""
        return self.pool.num_pages

    @property
    def num_available(self) -> int:
        """Pages that no live request holds: free ones and those that can be evicted."""
        return self.pool.num_free + self.tree.num_evictable

    def admit(
        self, request_id: str, token_ids: list[int], salt: str = "", *, reserve: int = 0, use: Use = NO_USE
    ) -> Allocation | Blocked | None:
        """Find the cached prefix and allocate pages for the rest of the tokens, all or nothing.

        At least the last token is left to compute. The full pages that are to be computed are in the tree
        from now on, so that others wait for them.

        Args:
            request_id: Of a request that holds no pages.
            token_ids: At least one.
            salt: Namespace of the tenant.
            reserve: Pages that must be available afterwards.
            use: Whose the request is.

        Returns:
            None if there are not enough pages, and `Blocked` if another request is computing part of the
            prefix.
        """
        assert request_id not in self._live, f"request {request_id!r} already holds pages"
        shareable = token_ids if self._prefix_caching else []
        num_public = self.public.num_pages(shareable)
        match = self.tree.match_prefix(shareable, salt, (len(token_ids) - 1) // self.page_size, num_public)
        if match.owner is not None:
            if self._single_flight:
                return Blocked(match.owner, len(match.pages))
            match = match.ready
        node = self.tree.lock(match, use)
        num_cached = len(match.pages)
        num_new = -(-len(token_ids) // self.page_size) - num_cached
        if not self._make_room(num_new, reserve):
            self.tree.forget(node)
            self.tree.unlock(node)
            return None
        new_pages = self.pool.allocate(num_new)
        num_full = len(shareable) // self.page_size
        at, stop = (PUBLIC, num_public) if num_cached < num_public else (salt, num_full)  # a run has one salt
        leaf = self.tree.insert_pending(
            node,
            at,
            token_ids[num_cached * self.page_size : stop * self.page_size],
            new_pages[: stop - num_cached],
            request_id,
            use,
        )
        allocation = Allocation(
            request_id=request_id,
            block_table=match.pages + new_pages,
            num_computed=num_cached * self.page_size,
            num_cached=num_cached * self.page_size,
            num_tree_pages=num_cached if leaf is node else stop,
            node=leaf,
            use=use,
            salt=salt,
            num_public=num_public,
            later=[] if leaf is node else token_ids[stop * self.page_size : num_full * self.page_size],
        )
        self._live[request_id] = allocation
        return allocation

    def covers(self, token_ids: list[int], salt: str = "") -> bool:
        """Whether all full pages of these tokens are there and ready; asking is a use of them."""
        num_pages = len(token_ids) // self.page_size
        match = self.tree.match_prefix(token_ids, salt, num_pages)
        if match.owner is not None or len(match.pages) < num_pages:
            return False
        self.tree.touch(match.node)
        return True

    def claim(
        self, holder: str, token_ids: list[int], salt: str, *, num_tokens: int, steps: float, number: int = 0
    ) -> None:
        """Note who will need these tokens, as far as they are cached; see `Retention.claim`.

        Args:
            holder: Who.
            token_ids: Of a request.
            salt: Of its tenant.
            num_tokens: How many of them, from the front.
            steps: Calls until then.
            number: Of the call that says so.
        """
        assert self.retention is not None, "claims mean nothing to a cache that evicts by recency"
        num_public = self.public.num_pages(token_ids)
        match = self.tree.match_prefix(token_ids, salt, num_tokens // self.page_size, num_public)
        if match.pages:
            self.retention.claim(holder, self.tree.end_of(match), steps, number)

    def extend(self, allocation: Allocation) -> bool:
        """Add one page for decoding; False if none is available."""
        if not self._make_room(1, 0):
            return False
        allocation.block_table += self.pool.allocate(1)
        return True

    def lend(self, allocation: Allocation, num_tokens: int, *, reserve: int) -> int:
        """Make room for draft tokens behind those that are computed; returns for how many there is room.

        Drafts are not computed until they are accepted: no page counts them, and no page that holds one gets
        into the tree. `trim` takes the pages back.

        Args:
            allocation: Of a request that decodes.
            num_tokens: Wanted.
            reserve: Pages that must be available afterwards.
        """
        wanted = allocation.num_computed + num_tokens
        while (room := len(allocation.block_table) * self.page_size) < wanted and self._make_room(1, reserve):
            allocation.block_table += self.pool.allocate(1)
        return min(num_tokens, room - allocation.num_computed)

    def trim(self, allocation: Allocation) -> None:
        """Free the pages behind the computed tokens of a request that decodes."""
        num_pages = -(-allocation.num_computed // self.page_size)
        self.pool.free(allocation.block_table[num_pages:])
        del allocation.block_table[num_pages:]

    def mark_computed(self, allocation: Allocation, num_tokens: int) -> None:
        """Note that the next `num_tokens` tokens are scheduled, or accepted; pages that they fill are ready."""
        allocation.num_computed += num_tokens
        assert allocation.num_computed <= len(allocation.block_table) * self.page_size, (
            f"{allocation.num_computed} tokens computed in {len(allocation.block_table)} pages"
        )
        if self._single_flight:
            self._publish(allocation)

    def step_ended(self, allocation: Allocation) -> None:
        """Note that the step is over which runs what was marked as computed."""
        if not self._single_flight:
            self._publish(allocation)

    def _publish(self, allocation: Allocation) -> None:
        """Let others find the pages that are computed."""
        self._set_ready(allocation)
        if allocation.later and allocation.node.owner is None:
            first, tokens = allocation.num_tree_pages, allocation.later
            pages = allocation.block_table[first : first + len(tokens) // self.page_size]
            owner, use = allocation.request_id, allocation.use
            leaf = self.tree.insert_pending(allocation.node, allocation.salt, tokens, pages, owner, use)
            allocation.later = []
            if leaf is not allocation.node:
                allocation.node, allocation.num_tree_pages = leaf, first + len(pages)
                self._set_ready(allocation)

    def release(
        self, allocation: Allocation, token_ids: list[int], *, insert_into_tree: bool = True, num_wanted: int = 0
    ) -> None:
        """End a request's hold on its pages.

        Args:
            allocation: Not to be used afterwards.
            token_ids: Its tokens, at least those computed.
            insert_into_tree: Keep all full computed pages, prompt and output, for later requests. Otherwise it was
                cancelled: only what somebody has used who was not stays, all else is free at once.
            num_wanted: Pages from the front that a `Blocked` request still waits for; they stay.
        """
        del self._live[allocation.request_id]
        self._publish(allocation)
        size, private = self.page_size, allocation.block_table[allocation.num_tree_pages :]
        node, pending = self.tree.drop_pending(allocation.node)
        self.pool.free(pending)
        num_kept = allocation.num_computed // size - allocation.num_tree_pages
        if insert_into_tree and self._prefix_caching and num_kept > 0:
            start = allocation.num_tree_pages * size
            tokens = token_ids[start : start + num_kept * size]
            num_public = max(0, allocation.num_public - allocation.num_tree_pages)
            use = allocation.use
            unused = self.tree.insert(node, allocation.salt, tokens, private[:num_kept], num_public, use)
            private = private[num_kept:] + unused
        self.pool.free(private)
        if insert_into_tree:
            self.tree.touch(node)
        else:
            self.tree.forget(node)
            node, dropped = self.tree.drop_unused(node, num_wanted)
            self.pool.free(dropped)
        self.tree.unlock(node)

    def check(self) -> None:
        """Assert what must always hold; linear in the pages, for tests."""
        held = Counter[int]()
        locks = Counter[int]()
        for live in self._live.values():
            held.update(live.block_table[live.num_tree_pages :])
            path = list(self.tree.path(live.node))
            locks.update(id(node) for node in path)
            pages = [page for node in reversed(path) for page in node.pages]
            assert pages == live.block_table[: live.num_tree_pages], f"{live.request_id}: {pages} is not its path"
        unlocked = 0
        for node in self.tree.nodes():
            held.update(node.pages)
            assert node.lock_count == locks[id(node)], f"{node.lock_count} locks, {locks[id(node)]} paths"
            assert len(node.tokens) == len(node.pages) * self.page_size
            assert node.pages or node.parent is None, "a node without pages"
            assert node.pages or node.children or node.lock_count, f"an empty root for {node.salt!r}"
            assert (node.owner is None) == (node.num_ready == len(node.pages))
            if node.owner is not None:
                assert self._live[node.owner].node is node
                assert node.lock_count == 1
                assert not node.children
            unlocked += 0 if node.lock_count else len(node.pages)
        held.update(page for page in range(self.num_pages) if self.pool.is_free(page))
        assert held == Counter(range(self.num_pages)), f"pages held {held}, there are {self.num_pages}"
        if self.retention is not None:
            self.retention.check()
        assert unlocked == self.tree.num_evictable, f"{unlocked} pages unlocked, {self.tree.num_evictable} counted"

    def _make_room(self, num_pages: int, reserve: int) -> bool:
        if self.num_available < num_pages + reserve:
            return False
        if (missing := num_pages - self.pool.num_free) > 0:
            pages = self.tree.evict(missing)
            self.num_evicted += len(pages)
            self.pool.free(pages)
        return True

    def _set_ready(self, allocation: Allocation) -> None:
        node = allocation.node
        if node.owner is not None:
            first = allocation.num_tree_pages - len(node.pages)
            self.tree.set_ready(node, min(allocation.num_computed // self.page_size - first, len(node.pages)))
