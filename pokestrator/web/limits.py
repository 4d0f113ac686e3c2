"""How many requests one address may send in a minute, counted in this worker's memory.

By the library `limits`, and its sliding window: it keeps two numbers for each bucket and forgets both after two
minutes. Its moving window, exact to the request, keeps an object for each of them and never forgets an address.
"""

from __future__ import annotations

import math
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

# Strangers choose their addresses, of which there are more than we have memory: they share this many buckets.
STRANGERS = 1_024


class RequestLimits:
    """Two kinds of buckets, so that no number of refused requests uses up anything of a caller's."""

    def __init__(self, per_minute: int) -> None:
        self._limit = RateLimitItemPerMinute(per_minute)
        self._counter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def count_caller(self, address: str) -> int | None:
        """Count a request of somebody who may call; the whole seconds they have to wait, or None."""
        return self._count("callers", address)

    def count_stranger(self, address: str) -> int | None:
        """Count a request that is refused; the seconds to wait before it is even told why, or None."""
        return self._count("strangers", str(hash(address) % STRANGERS))  # salted anew in each process

    def _count(self, kind: str, bucket: str) -> int | None:
        if self._counter.hit(self._limit, kind, bucket):
            return None
        freed_at = self._counter.get_window_stats(self._limit, kind, bucket).reset_time
        return max(1, math.ceil(freed_at - time.time()))
