"""Counts how often each caller does something, such as calling or sending a wrong API key.

Each process counts for itself, in memory: the limits hold for one ingress (D50), and start again with it.
"""

# D117: how often a caller may call

from __future__ import annotations

from time import monotonic

from limits import RateLimitItem, RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.storage import Storage
from limits.strategies import FixedWindowRateLimiter

MOST_CALLERS = 10_000
"""Most callers that are counted at once, for each limit; above that, the one whose window is the oldest is forgotten.

10,000 of them take 2 MB.
"""


class Windows(Storage):
    """Counts calls in fixed windows, which begin with a caller's first call. Its memory is bounded.

    In place of the library's own storage in memory, which starts a thread for every call that comes more than 10 ms
    after the last one, has no bound, and uses the wall clock (limits 5.8, ``limits/storage/memory.py``).
    All windows of one object must have the same length. Not thread-safe.
    """

    STORAGE_SCHEME = None

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[str, tuple[int, float]] = {}
        """The count and the end of each window, by the begin of the window."""

    @property
    def base_exceptions(self) -> type[Exception]:
        """The storage raises no exceptions of its own."""
        return ValueError

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Count, in a new window of ``expiry`` seconds if there is none; return the sum in the window."""
        now_s = monotonic()
        count, end_s = self._windows.get(key, (0, 0.0))
        if now_s >= end_s:
            self._windows.pop(key, None)  # so that it is stored as the last one
            if len(self._windows) >= MOST_CALLERS:
                del self._windows[next(iter(self._windows))]
            count, end_s = 0, now_s + expiry
        self._windows[key] = count + amount, end_s
        return count + amount

    def get(self, key: str) -> int:
        """Return the sum in the window; 0 if there is none."""
        count, end_s = self._windows.get(key, (0, 0.0))
        return count if monotonic() < end_s else 0

    def get_expiry(self, key: str) -> float:
        """Return the end of the window, seconds of the monotonic clock; of one that is over, now."""
        return max(self._windows.get(key, (0, 0.0))[1], monotonic())

    def check(self) -> bool:
        """Memory is always there."""
        return True

    def reset(self) -> int:
        """Forget all windows; return how many there were."""
        there = len(self._windows)
        self._windows.clear()
        return there

    def clear(self, key: str) -> None:
        """Forget the window of a caller."""
        self._windows.pop(key, None)


class Rate:
    """How often each caller may do one thing. ``limit`` None: as often as it likes."""

    def __init__(self, limit: RateLimitItem | None) -> None:
        self._limit = limit
        self._limiter = FixedWindowRateLimiter(Windows())

    def count(self, caller: str) -> float | None:
        """Count once; return None if that is allowed, else the seconds until it is."""
        if self._limit is None or self._limiter.hit(self._limit, caller):
            return None
        return self._wait_s(self._limit, caller)

    def used_up(self, caller: str) -> float | None:
        """Return the seconds until the next one is allowed; None if it is allowed now. Counts nothing."""
        if self._limit is None or self._limiter.test(self._limit, caller):
            return None
        return self._wait_s(self._limit, caller)

    def _wait_s(self, limit: RateLimitItem, caller: str) -> float:
        return self._limiter.get_window_stats(limit, caller).reset_time - monotonic()


def per_second(most: int | None) -> Rate:
    """Return a rate per second; None: no limit."""
    return Rate(None if most is None else RateLimitItemPerSecond(most))


def per_minute(most: int | None) -> Rate:
    """Return a rate per minute; None: no limit."""
    return Rate(None if most is None else RateLimitItemPerMinute(most))
