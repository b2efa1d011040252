"""State that lives between chunks: the streaming contract and the ring key/value cache. Knows torch only."""

from lipstream.streaming.base import Snapshot, StreamingModule, clone_state
from lipstream.streaming.kv_cache import KVCache, KVCacheSnapshot, Window

__all__ = ["KVCache", "KVCacheSnapshot", "Snapshot", "StreamingModule", "Window", "clone_state"]
