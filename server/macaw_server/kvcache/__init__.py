"""KV cache bookkeeping: page pool, radix tree of prefixes, pages per request. Pure: no tensors, no clock."""

from macaw_server.kvcache.kv_cache import Allocation, Blocked, KVCache
from macaw_server.kvcache.page_pool import PagePool
from macaw_server.kvcache.radix_tree import Match, Node, RadixTree

__all__ = ["Allocation", "Blocked", "KVCache", "Match", "Node", "PagePool", "RadixTree"]
