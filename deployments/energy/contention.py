"""When others were at work on the hardware of a wrapper, as far as that can be told."""

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
"""How often others are looked for, seconds."""

Look = Callable[[float], tuple[bool | None, float]]
"""Tells whether others were at work (None: can't be told), and since when that holds; its argument is the time now."""

log = structlog.get_logger("deployments.energy.contention")


def since_asked(look: Callable[[], bool | None]) -> Look:
    """A look that sees whether others were at work since it was last asked."""
    asked_s: float | None = None

    def since_last(now_s: float) -> tuple[bool | None, float]:
        nonlocal asked_s
        answer, since_s = look(), now_s if asked_s is None else asked_s
        asked_s = now_s
        return answer, since_s

    return since_last


def at_once(look: Callable[[float], bool | None]) -> Look:
    """A look that sees a moment only: between two such moments others were at work if they were at one of them."""
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
    """Keeps the times between two looks in which others were seen, and those of which it can't be told. Thread-safe.

    A look that fails can't tell.
    """

    def __init__(self, looks: Iterable[Look]) -> None:
        self._looks = list(looks)
        self._lock = threading.Lock()
        self._looked_s = -math.inf
        self._seen: deque[Interval] = deque(maxlen=100_000)
        self._unknown: deque[Interval] = deque(maxlen=100_000)
        self._failures: set[tuple[int, type[Exception]]] = set()

    def look(self, now_s: float) -> None:
        """Look for others; takes milliseconds, for the poller. Times never go back."""
        answers = [self._answer(index, now_s) for index in range(len(self._looks))]
        with self._lock:
            last_s, self._looked_s = self._looked_s, now_s
            for kept, kind in ((self._seen, True), (self._unknown, None)):
                found_s = [since_s for answer, since_s in answers if answer is kind]
                if kind is None and 2 * PERIOD_S < now_s - last_s < math.inf:
                    found_s.append(last_s)  # of the time in between nobody can tell
                if found_s:
                    kept.append((min(found_s), now_s))

    def _answer(self, index: int, now_s: float) -> tuple[bool | None, float]:
        try:
            return self._looks[index](now_s)
        except Exception as error:  # whatever it is, the counters have to be read on
            kind = (index, type(error))
            if kind not in self._failures:
                self._failures.add(kind)
                log.exception("contention.look_failed")
            return None, now_s if self._looked_s == -math.inf else self._looked_s

    def looked(self, time_s: float) -> bool:
        """Whether others were looked for since this time: what is told of the time before is final."""
        with self._lock:
            return self._looked_s >= time_s

    def seen(self, start_s: float, end_s: float) -> bool:
        """Whether others were seen at work between two times. For a period after the last look its answer holds."""
        with self._lock:
            return _any_in(self._seen, self._begun(start_s), end_s)

    def unknown(self, start_s: float, end_s: float) -> bool:
        """Whether for a part of that time it could not be told."""
        with self._lock:
            return _any_in(self._unknown, self._begun(start_s), end_s)

    def _begun(self, start_s: float) -> float:
        return self._looked_s if self._looked_s < start_s <= self._looked_s + PERIOD_S else start_s


def _any_in(times: deque[Interval], first_s: float, last_s: float) -> bool:
    """Whether one of these intervals, which are in order, has a time in common with this one."""
    index = bisect_left(times, first_s, key=itemgetter(1))
    return index < len(times) and times[index][0] <= last_s
