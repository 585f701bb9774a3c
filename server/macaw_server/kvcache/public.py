"""Text that the operator has declared public: the one thing that all tenants share in the cache."""

from __future__ import annotations

from collections.abc import Sequence


class PublicPrefixes:
    """Which pages of a prompt hold declared text, from the front.

    Tokens of such a page say nothing of who sent them: they, and all before them, are the operator's. So its K/V may
    be anybody's.

    Args:
        prefixes: Tokens of each declared prefix; what is left over behind its last full page is not shared.
        page_size: Tokens per page.
    """

    def __init__(self, prefixes: Sequence[Sequence[int]], page_size: int) -> None:
        self._page_size = page_size
        self._prefixes = [list(prefix) for prefix in prefixes if len(prefix) >= page_size]

    def num_pages(self, token_ids: list[int]) -> int:
        """Full pages from the front of `token_ids` that are the front of a declared prefix too."""
        return max((self._num_common(prefix, token_ids) for prefix in self._prefixes), default=0)

    def _num_common(self, prefix: list[int], token_ids: list[int]) -> int:
        size, same, most = self._page_size, 0, min(len(prefix), len(token_ids)) // self._page_size
        while same < most:  # bisecting leaves the comparison of tokens to list slices
            mid = (same + most + 1) // 2
            if prefix[same * size : mid * size] == token_ids[same * size : mid * size]:
                same = mid
            else:
                most = mid - 1
        return same
