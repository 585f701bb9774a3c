"""Which pages of the KV memory are free. Numbers only; the tensors behind them are the engine's."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """A stack of free page numbers ``0 .. num_pages - 1``; O(1) per page.

    Whoever allocates a page owns it until it frees it. The pool knows that a page is taken, not by whom.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"A pool of {num_pages} pages cannot hold a token; give it at least 1.")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # the lowest number on top: a fresh pool fills in order
        self._taken = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can still hand out."""
        return len(self._free)

    def allocate(self, n: int) -> list[int]:
        """Take `n` pages; asking for more than there are is a bug of the caller."""
        assert 0 <= n <= len(self._free), f"{n} pages asked for, {len(self._free)} of {self.num_pages} are free"
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._taken[page] = 1
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back, each exactly once."""
        for page in pages:
            assert 0 <= page < self.num_pages, f"page {page} is not one of this pool's 0 to {self.num_pages - 1}"
            assert self._taken[page], f"page {page} freed twice: {len(self._free)} of {self.num_pages} are free"
            self._taken[page] = 0
            self._free.append(page)

    def is_free(self, page: int) -> bool:
        """Whether nobody owns the page."""
        return not self._taken[page]
