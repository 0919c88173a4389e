"""Records when other processes were at work on a wrapper's hardware, and when this is unknown.

"Others" are all processes that do not belong to the wrapper.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from operator import itemgetter

import structlog

from deployments.energy.timeline import Interval

PERIOD_S = 1.0
"""How often to look for others, seconds."""

Look = Callable[[float], tuple[bool | None, float]]
"""Takes the time now; returns whether others were at work (None if unknown), and since when that answer holds."""

log = structlog.get_logger("deployments.energy.contention")


def since_asked(look: Callable[[], bool | None]) -> Look:
    """Return a `Look` for a function that says whether others were at work since its last call."""
    asked_s: float | None = None

    def since_last(now_s: float) -> tuple[bool | None, float]:
        nonlocal asked_s
        answer, since_s = look(), now_s if asked_s is None else asked_s
        asked_s = now_s
        return answer, since_s

    return since_last


def at_once(look: Callable[[float], bool | None]) -> Look:
    """Return a `Look` for a function that sees only the present.

    Others that it sees at one call count for all of the time since the previous call, and until the next one.
    """
    before: bool | None = False
    before_s: float | None = None

    def since_last(now_s: float) -> tuple[bool | None, float]:
        nonlocal before, before_s
        answer, since_s = look(now_s), now_s if before_s is None else before_s
        either = answer or before or (None if None in (answer, before) else False)
        before, before_s = answer, now_s
        return either, since_s

    return since_last


class Contention:
    """Keeps two lists of intervals: those in which others were seen, and those for which this is unknown. Thread-safe.

    An interval lies between two checks. A check that fails counts as unknown.
    """

    def __init__(self, looks: Iterable[Look]) -> None:
        self._looks = list(looks)
        self._lock = threading.Lock()
        self._looked_s = -math.inf
        self._seen: deque[Interval] = deque(maxlen=100_000)
        self._unknown: deque[Interval] = deque(maxlen=100_000)
        self._failures: set[tuple[int, type[Exception]]] = set()

    def look(self, now_s: float) -> None:
        """Look for others; takes milliseconds, in the poller. Times must not decrease."""
        answers = [self._answer(index, now_s) for index in range(len(self._looks))]
        with self._lock:
            last_s, self._looked_s = self._looked_s, now_s
            for kept, kind in ((self._seen, True), (self._unknown, None)):
                found_s = [since_s for answer, since_s in answers if answer is kind]
                if kind is None and 2 * PERIOD_S < now_s - last_s < math.inf:
                    found_s.append(last_s)  # the time in between is unknown
                if found_s:
                    kept.append((min(found_s), now_s))

    def _answer(self, index: int, now_s: float) -> tuple[bool | None, float]:
        try:
            return self._looks[index](now_s)
        except Exception as error:  # whatever it is, the counters must be read
            kind = (index, type(error))
            if kind not in self._failures:
                self._failures.add(kind)
                log.exception("contention.look_failed")
            return None, now_s if self._looked_s == -math.inf else self._looked_s

    def looked(self, time_s: float) -> bool:
        """Whether the last check for others was at or after this time; then answers about earlier times are final."""
        with self._lock:
            return self._looked_s >= time_s

    def found(self, start_s: float, end_s: float) -> tuple[bool, bool]:
        """Return whether others were seen at work between two times, and whether this is unknown for a part of it.

        The last check holds for PERIOD_S seconds after it.
        """
        with self._lock:
            if self._looked_s < start_s <= self._looked_s + PERIOD_S:
                start_s = self._looked_s
            return _any_in(self._seen, start_s, end_s), _any_in(self._unknown, start_s, end_s)


def _any_in(times: deque[Interval], first_s: float, last_s: float) -> bool:
    """Whether one of these intervals, which are in order, overlaps the time from ``first_s`` to ``last_s``."""
    index = bisect_left(times, first_s, key=itemgetter(1))
    return index < len(times) and times[index][0] <= last_s
