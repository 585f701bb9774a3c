"""KV cache bookkeeping: page pool, radix tree of prefixes, pages per request. Pure: no tensors, no clock."""

from macaw_server.kvcache.kv_cache import Allocation, Blocked, Eviction, KVCache
from macaw_server.kvcache.node import NO_USE, Match, Node, Use
from macaw_server.kvcache.page_pool import PagePool
from macaw_server.kvcache.radix_tree import RadixTree

__all__ = ["NO_USE", "Allocation", "Blocked", "Eviction", "KVCache", "Match", "Node", "PagePool", "RadixTree", "Use"]
