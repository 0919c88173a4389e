"""Keeps the busy intervals of a wrapper's hardware, in order of time. Pure.

The beginning and the end of work are recorded at once, so answers about past times never change.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

KEPT_INTERVALS = 50_000
"""At least this many of the latest busy intervals are kept."""


# D59: the times when work began and ended divide a counter's step
class Activity:
    """The times in which prompts were in flight or an LLM was starting. Not thread-safe: its owner locks.

    ``known_from_s``: nothing is known of earlier times.
    """

    def __init__(self) -> None:
        self.known_from_s = -math.inf
        self._running = 0
        self._begins_s = array("d")
        self._ends_s = array("d")

    def begin(self, at_s: float) -> None:
        """Note that a piece of work begins. Times must not decrease."""
        self._running += 1
        if self._running > 1:
            return
        if self._ends_s and at_s <= self._ends_s[-1]:
            self._ends_s[-1] = math.inf
            return
        self._begins_s.append(at_s)
        self._ends_s.append(math.inf)
        if len(self._begins_s) > 2 * KEPT_INTERVALS:
            self.known_from_s = self._ends_s[KEPT_INTERVALS - 1]
            del self._begins_s[:KEPT_INTERVALS], self._ends_s[:KEPT_INTERVALS]

    def end(self, at_s: float) -> None:
        """Note that a piece of work ends."""
        self._running -= 1
        if not self._running:
            self._ends_s[-1] = at_s

    @property
    def working(self) -> bool:
        """Whether there is work now."""
        return self._running > 0

    def busy_s(self, start_s: float, end_s: float) -> float:
        """Return the busy seconds between two times."""
        begins_s, ends_s = self._begins_s, self._ends_s
        busy_s = 0.0
        index = bisect_right(ends_s, start_s)
        while index < len(begins_s) and begins_s[index] < end_s:
            busy_s += min(ends_s[index], end_s) - max(begins_s[index], start_s)
            index += 1
        return busy_s

    def lengths_s(self, start_s: float, end_s: float) -> Iterator[float]:
        """Yield the lengths of the busy intervals that overlap or touch this time; infinite for one in progress."""
        for index in range(bisect_left(self._ends_s, start_s), bisect_right(self._begins_s, end_s)):
            yield self._ends_s[index] - self._begins_s[index]

    def next_begin_s(self, time_s: float) -> float:
        """Return when the work in progress at this time began, else when the next work begins; infinite if none."""
        index = bisect_right(self._ends_s, time_s)
        return self._begins_s[index] if index < len(self._begins_s) else math.inf

    def gaps(self, start_s: float, end_s: float) -> Iterator[tuple[float, float]]:
        """Yield the idle intervals that overlap the time from ``start_s`` to ``end_s``, not cut to this time.

        The end of the last one is infinite until new work begins.
        """
        for index in range(bisect_right(self._ends_s, start_s), len(self._begins_s) + 1):
            gap_begin_s = self._ends_s[index - 1] if index else self.known_from_s
            if gap_begin_s >= end_s:
                return
            gap_end_s = self._begins_s[index] if index < len(self._begins_s) else math.inf
            if gap_end_s > start_s:
                yield gap_begin_s, gap_end_s

    def idle(self, after_s: float, until_s: float) -> Iterator[tuple[float, float]]:
        """Yield the idle intervals that end after ``after_s``, and at or before ``until_s``."""
        for index in range(bisect_right(self._begins_s, after_s), bisect_right(self._begins_s, until_s)):
            yield (self._ends_s[index - 1] if index else self.known_from_s), self._begins_s[index]
