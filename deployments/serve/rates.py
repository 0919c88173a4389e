"""Counts how often each caller does something, such as calling or sending a wrong API key.

Each process counts for itself, in memory: the limits hold for one ingress (D50), and start again with it.
"""

# D117: how often a caller may call

from __future__ import annotations

from time import monotonic

MOST_CALLERS = 10_000
"""Most callers that are counted at once, for each limit; above that, the one whose window is the oldest is forgotten.

10,000 of them take 2 MB.
"""


class Rate:
    """How often each caller may do one thing in ``window_s`` seconds. ``most`` None: as often as it likes.

    A window begins with a caller's first call, and the next one with its first call after that. Not thread-safe.
    """

    def __init__(self, most: int | None, window_s: float) -> None:
        self.most = most
        self._window_s = window_s
        self._windows: dict[str, tuple[int, float]] = {}
        """By caller: the count and the end of its window (monotonic clock), sorted by the begin of the window."""

    def count(self, caller: str) -> float | None:
        """Count once; return None if that is allowed, else the seconds until it is."""
        if self.most is None:
            return None
        now_s = monotonic()
        count, end_s = self._windows.get(caller, (0, 0.0))
        if now_s >= end_s:
            self._windows.pop(caller, None)  # so that it is stored as the last one
            if len(self._windows) >= MOST_CALLERS:
                del self._windows[next(iter(self._windows))]
            count, end_s = 0, now_s + self._window_s
        if count >= self.most:
            return end_s - now_s
        self._windows[caller] = count + 1, end_s
        return None

    def used_up(self, caller: str) -> float | None:
        """Return the seconds until the next one is allowed; None if it is allowed now. Counts nothing."""
        now_s = monotonic()
        count, end_s = self._windows.get(caller, (0, 0.0))
        return end_s - now_s if self.most is not None and count >= self.most and now_s < end_s else None


def per_second(most: int | None) -> Rate:
    """Return a rate per second; None: no limit."""
    return Rate(most, 1.0)


def per_minute(most: int | None) -> Rate:
    """Return a rate per minute; None: no limit."""
    return Rate(most, 60.0)
