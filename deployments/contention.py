"""When others were at work on the hardware of a wrapper, as far as that can be told."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable

PERIOD_S = 1.0
"""How often others are looked for, seconds."""

Look = Callable[[float], tuple[bool | None, float]]
"""Tells whether others were at work (None: can't be told), and since when that holds; its argument is the time now."""


def at_once(look: Callable[[float], bool | None]) -> Look:
    """A look that tells of the moment only."""
    return lambda now_s: (look(now_s), now_s)


class Contention:
    """Keeps the times at which others were seen, and those at which that could not be told. Thread-safe."""

    def __init__(self, looks: Iterable[Look]) -> None:
        self._looks = list(looks)
        self._lock = threading.Lock()
        self._looked_s: float | None = None
        self._seen_s: deque[float] = deque(maxlen=100_000)
        self._unknown_s: deque[float] = deque(maxlen=100_000)

    def look(self, now_s: float) -> None:
        """Look for others; takes milliseconds, for the poller. Times never go back."""
        answers = [look(now_s) for look in self._looks]
        last_s, self._looked_s = self._looked_s, now_s
        seen_s = {time_s for answer, since_s in answers if answer for time_s in _from_to(since_s, now_s)}
        unknown_s = {time_s for answer, since_s in answers if answer is None for time_s in _from_to(since_s, now_s)}
        if last_s is not None and now_s - last_s > 2 * PERIOD_S:  # of the time in between nobody can tell
            unknown_s.update(_from_to(last_s, now_s))
        with self._lock:
            self._seen_s.extend(sorted(seen_s))
            self._unknown_s.extend(sorted(unknown_s))

    def seen(self, start_s: float, end_s: float) -> bool:
        """Whether others were seen at work between two times, or in the period before, after which nothing looked."""
        with self._lock:
            return _any_in(self._seen_s, start_s - PERIOD_S, end_s)

    def unknown(self, start_s: float, end_s: float) -> bool:
        """Whether for a part of that time it could not be told."""
        with self._lock:
            return _any_in(self._unknown_s, start_s - PERIOD_S, end_s)


def _from_to(first_s: float, last_s: float) -> list[float]:
    """Times of a stretch, so many that every window in it is within a period of one."""
    count = max(math.ceil((last_s - first_s) / PERIOD_S), 1)
    return [first_s + number * PERIOD_S for number in range(count)]


def _any_in(times_s: deque[float], first_s: float, last_s: float) -> bool:
    return bisect_left(times_s, first_s) < bisect_right(times_s, last_s)
