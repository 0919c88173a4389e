"""The mathematics of counters that tick: a history of edges, and what a window between them holds.

Pure: the times come in as arguments. Units are those of the counter: joules, or CPU-seconds for a CPU model.

A counter is a staircase under the true curve E(t), which only rises. Each edge is kept with the two times that
enclose it: ``before``, when it had certainly not ticked yet, and ``seen``, when its value had certainly been
reached. So E(before) <= units <= E(seen) whatever the counter's period is, and any subset of the edges gives bounds
that hold: old history can be thinned out without becoming wrong.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

_FINE_S = 600.0
"""Every edge of the last ten minutes is kept, of older times one a second."""
_COARSE_S = 1.0
_TREND_S = 0.3
"""How far back the slope is taken from which the time since the last edge is estimated."""
_MAX_RUNS = 16
_LEVELS_KEPT = 8192


class NoWindow(Exception):
    """The history can't tell what a window holds; ``flag`` is the reason in one word."""

    def __init__(self, flag: str) -> None:
        super().__init__(flag)
        self.flag = flag


class Level(NamedTuple):
    """A counter's reading at a time, or the difference of two: the truth is within low and high, mid is the estimate.

    ``provisional``: no edge after that time has been seen yet, so it is extrapolated and a later look is sharper.
    """

    low: float
    mid: float
    high: float
    provisional: bool


def between(start: Level, end: Level) -> Level:
    """What flowed from one level to a later one; never negative."""
    return Level(
        low=max(end.low - start.high, 0.0),
        mid=max(end.mid - start.mid, 0.0),
        high=end.high - start.low,
        provisional=end.provisional,
    )


class _Run:
    """Edges of a counter between two breaks, in order of time."""

    __slots__ = ("_final", "_provisional", "_thinned", "before_s", "seen_s", "units", "why")

    def __init__(self, why: str) -> None:
        self.why = why
        # Prompts in flight together ask for the same times, over and over.
        self._final: dict[float, Level] = {}
        self._provisional: dict[float, Level] = {}
        self.before_s = array("d")
        self.seen_s = array("d")
        self.units = array("d")
        self._thinned = 0

    def append(self, before_s: float, seen_s: float, units: float) -> None:
        self.before_s.append(before_s)
        self.seen_s.append(seen_s)
        self.units.append(units)
        self._provisional.clear()

    def stay(self, before_s: float, seen_s: float) -> None:
        """The last edge was the last of a flat stretch, which went on until now."""
        self.before_s[-1], self.seen_s[-1] = before_s, seen_s
        self._provisional.clear()

    def thin(self, history_s: float) -> None:
        """Forget what is older than the history, and most edges of what is older than `_FINE_S`."""
        now_s = self.seen_s[-1]
        fine = bisect_left(self.seen_s, now_s - _FINE_S)
        kept: list[int] = []
        last_s = self.seen_s[self._thinned - 1] if self._thinned else -math.inf
        for index in range(self._thinned, fine):
            if self.seen_s[index] >= last_s + _COARSE_S:
                kept.append(index)
                last_s = self.seen_s[index]
        forgotten = bisect_left(self.seen_s, now_s - history_s, 0, self._thinned)
        for name in ("before_s", "seen_s", "units"):
            old: array[float] = getattr(self, name)
            new = old[forgotten : self._thinned]
            new.extend([old[index] for index in kept])
            new.extend(old[fine:])
            setattr(self, name, new)
        self._thinned += len(kept) - forgotten

    def _mid_s(self, index: int) -> float:
        return (self.before_s[index] + self.seen_s[index]) / 2

    def _trend(self) -> float:
        """Units per second just before the last edge."""
        last = len(self.units) - 1
        first = min(bisect_left(self.seen_s, self.seen_s[last] - _TREND_S), last - 1)
        elapsed_s = self._mid_s(last) - self._mid_s(first)
        return (self.units[last] - self.units[first]) / elapsed_s if elapsed_s > 0 else 0.0

    def levels(self, times_s: Sequence[float], step: float, max_rate: float | None) -> list[Level]:
        """The counter at times not before the first edge. Takes at least two edges."""
        final, provisional = self._final.get, self._provisional.get
        return [final(time_s) or provisional(time_s) or self._looked_up(time_s, step, max_rate) for time_s in times_s]

    def _looked_up(self, time_s: float, step: float, max_rate: float | None) -> Level:
        found = self._at(time_s, step, max_rate)
        kept = self._provisional if found.provisional else self._final
        if len(kept) >= _LEVELS_KEPT:
            kept.clear()
        kept[time_s] = found
        return found

    def _at(self, time_s: float, step: float, max_rate: float | None) -> Level:
        last = len(self.units) - 1
        floor = bisect_right(self.seen_s, time_s) - 1
        ceiling = bisect_left(self.before_s, time_s)
        left = floor
        while left < last and self._mid_s(left + 1) <= time_s:
            left += 1
        if left < last:
            span_s = self._mid_s(left + 1) - self._mid_s(left)
            part = (time_s - self._mid_s(left)) / span_s
            mid = self.units[left] + part * (self.units[left + 1] - self.units[left])
        else:
            mid = self.units[last] + self._trend() * (time_s - self._mid_s(last))
        if ceiling <= last:
            high = max(self.units[ceiling], self.units[floor]) + step
            return Level(self.units[floor], min(mid, high), high, provisional=False)
        rate = 2 * self._trend() if max_rate is None else max_rate
        high = self.units[last] + step + rate * (time_s - self.before_s[last])
        return Level(self.units[floor], min(mid, high), high, provisional=True)


class Track:
    """The bounded history of one counter. Not thread-safe: its owner locks.

    Args:
        max_age_s: How old a reading of the counter can be; None if not known, and then only a change of it tells
            something.
        step: The counter's smallest step, in its units: readings are rounded down by less than this.
        max_rate: More units a second can't be; None if not known, and then twice the last rate stands for it.
        history_s: How far back windows can reach, seconds.
        stale_s: How long after the last edge a window may end, seconds.
    """

    def __init__(
        self, *, max_age_s: float | None, step: float, max_rate: float | None, history_s: float, stale_s: float
    ) -> None:
        self._max_age_s = max_age_s
        self._step = step
        self.max_rate = max_rate
        self._history_s = history_s
        self._stale_s = stale_s
        self._runs: deque[_Run] = deque([_Run("out_of_history")], maxlen=_MAX_RUNS)
        self._last_units: float | None = None
        self._last_asked_s = 0.0
        self._thin_at = 0

    def add(self, asked_s: float, answered_s: float, units: float) -> None:
        """Take a reading that was asked for and answered at these times. A fall of it breaks the history."""
        last = self._last_units
        if last is not None and units < last:
            self.lost("counter_reset")
            last = None
        run = self._runs[-1]
        if self._max_age_s is not None:
            # Known to be fresh, so a flat stretch is knowledge too: keep its first and its last reading.
            if len(run.units) > 1 and run.units[-2] == run.units[-1] == units:
                run.stay(asked_s - self._max_age_s, answered_s)
            else:
                run.append(asked_s - self._max_age_s, answered_s, units)
        elif last is not None and units > last:
            run.append(self._last_asked_s, answered_s, units)
        self._last_units, self._last_asked_s = units, asked_s
        if len(run.units) > self._thin_at and len(run.units) > 1:
            run.thin(self._history_s)
            # Thin again when as much has come as was left: a constant cost per reading.
            self._thin_at = len(run.units) + max(len(run.units) // 2, 1000)

    def lost(self, why: str) -> None:
        """The counter's continuity is broken: nothing is known of windows that span this moment."""
        self._runs.append(_Run(why))
        self._last_units = None
        self._thin_at = 0

    def settled(self, time_s: float) -> bool:
        """Whether an edge after this time has been seen, so that a window that ends then will not get any sharper."""
        return any(bool(run.before_s) and run.before_s[-1] >= time_s for run in self._runs)

    def levels(self, times_s: Sequence[float]) -> list[Level]:
        """The counter at each of these times (one or more, in any order).

        Raises:
            NoWindow: They are not all inside one unbroken stretch of the history.
        """
        first_s, last_s = min(times_s), max(times_s)
        why = "out_of_history"
        for run in reversed(self._runs):
            if run.seen_s and run.seen_s[0] <= first_s:
                break
            why = run.why
        else:
            # A counter that answers and never moves is worth its own word.
            raise NoWindow("no_edge" if len(self._runs) == 1 and not run.seen_s else why)
        if run is not self._runs[-1] and last_s > run.before_s[-1]:
            raise NoWindow(why)
        if len(run.units) < 2:
            raise NoWindow("no_edge")
        if last_s > run.seen_s[-1] + self._stale_s:
            raise NoWindow("stale")
        return run.levels(times_s, self._step, self.max_rate)
