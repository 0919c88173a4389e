"""The history of a stepping counter: its edges, and the energy between any two times. Pure: times are arguments.

A counter is a staircase under the true curve E(t), which never falls, in joules (CPU-seconds for the CPU model). Each
edge is kept with two times that enclose it: ``before``, when the counter had certainly not stepped yet, and ``seen``,
when its value had certainly been reached. So E(before) <= units <= E(seen), whatever the counter's period is. Any
subset of the edges gives valid bounds, so old edges can be dropped.

Between two edges E(t) is estimated. If the hardware was idle for a part of that time, this part
gets the idle power, measured by the edges just before or just after the work. The busy part gets
the rest of the energy. Otherwise E(t) is a straight line. All windows use the same E(t), and an
estimate becomes final once the counter was watched for a while after the later edge. So successive
windows add up exactly.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from deployments.energy.counters.activity import Activity
from deployments.energy.counters.usual_period import UsualPeriod
from registry.wire.flags import Flag

_FINE_S = 600.0
"""Every edge of the last ten minutes is kept; of older ones, one per second."""
_COARSE_S = 1.0
_TREND_S = 0.3
"""After the last edge, E(t) is continued with its mean slope in this many seconds before the edge."""
_MAX_RUNS = 16
_LEVELS_KEPT = 8192
_IDLE_S = 0.5
"""Shortest idle time whose power is used, seconds: edges are seen late, so shorter times give inaccurate power."""
_IDLE_MOST_S = 2.0
"""The power of an idle time is taken from its last seconds, at most this many: they are nearest to the next work."""
_IDLE_KEPT = 4096
_AFTER_S = 0.5
"""How long the counter is watched after work before the power after it counts as known, seconds."""


class NoWindow(Exception):
    """The history is not enough to compute a window; ``flag`` is the reason in one word."""

    def __init__(self, flag: Flag) -> None:
        super().__init__(flag)
        self.flag = flag


class Level(NamedTuple):
    """A counter's reading at a time, or the difference of two: an estimate ``mid``, and bounds of the true value.

    ``provisional``: too little has been seen after that time; a later estimate is sharper.
    ``systematic``: the part of the error that has the same sign in similar windows.
    """

    low: float
    mid: float
    high: float
    provisional: bool
    systematic: float = 0.0


def between(start: Level, end: Level) -> Level:
    """Return how much the counter rose from one level to a later one; never negative."""
    return Level(
        low=max(end.low - start.high, 0.0),
        mid=max(end.mid - start.mid, 0.0),
        high=end.high - start.low,
        provisional=end.provisional,
        systematic=start.systematic + end.systematic,
    )


class _IdleRate(NamedTuple):
    """A counter's rate while the hardware is idle, and the error of the rate; units per second."""

    rate: float
    error: float


class _Idle:
    """A counter's rates while the hardware was idle, in order of time."""

    __slots__ = ("_rates", "_seen_until_s", "_until_s")

    def __init__(self) -> None:
        self._until_s = array("d")
        self._rates: list[_IdleRate] = []
        self._seen_until_s = -math.inf

    def before(self, time_s: float, run: _Run, activity: Activity) -> tuple[float, _IdleRate] | None:
        """Return when the last idle time before ``time_s`` ended, and its rate; None if there is none.

        Call this only after every edge before ``time_s`` was seen; then the answer never changes.
        """
        for start_s, end_s in activity.idle(self._seen_until_s, time_s):
            self._seen_until_s = end_s
            found = run.rate_between(max(start_s, end_s - _IDLE_MOST_S), end_s)
            if found is not None:
                self._until_s.append(end_s)
                self._rates.append(found)
        if len(self._rates) > 2 * _IDLE_KEPT:
            del self._until_s[:_IDLE_KEPT], self._rates[:_IDLE_KEPT]
        index = bisect_right(self._until_s, time_s)
        return (self._until_s[index - 1], self._rates[index - 1]) if index else None


class _Run:
    """Edges of a counter between two gaps in its history, in order of time."""

    __slots__ = (
        "_activity",
        "_final",
        "_idle",
        "_provisional",
        "_thinned",
        "_trend_now",
        "before_s",
        "looked_s",
        "seen_s",
        "units",
        "why",
    )

    def __init__(self, why: Flag, activity: Activity) -> None:
        self.why = why
        self._activity = activity
        self._idle = _Idle()
        # Caches: prompts that are in flight together ask for the same times many times.
        self._final: dict[float, Level] = {}
        self._provisional: dict[float, Level] = {}
        self._trend_now: float | None = None
        self.before_s = array("d")
        self.seen_s = array("d")
        self.units = array("d")
        self._thinned = 0
        self.looked_s = -math.inf

    def looked(self, at_s: float) -> None:
        """Note that the counter was read; ``at_s`` is infinite if it will not be read again in this run."""
        self.looked_s = at_s
        self._provisional.clear()
        self._trend_now = None

    def append(self, before_s: float, seen_s: float, units: float) -> None:
        self.before_s.append(before_s)
        self.seen_s.append(seen_s)
        self.units.append(units)

    def stay(self, before_s: float, seen_s: float) -> None:
        """Move the last edge, which ends a flat stretch, to the time of the newest reading."""
        self.before_s[-1], self.seen_s[-1] = before_s, seen_s

    def thin(self, history_s: float) -> None:
        """Drop edges older than the history, and most of those older than `_FINE_S`."""
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
        """Return the units per second just before the last edge; cached until the counter is read again."""
        if self._trend_now is None:
            self._trend_now = self._last_rate()
        return self._trend_now

    def _last_rate(self) -> float:
        last = len(self.units) - 1
        first = min(bisect_left(self.seen_s, self.seen_s[last] - _TREND_S), last - 1)
        elapsed_s = self._mid_s(last) - self._mid_s(first)
        return (self.units[last] - self.units[first]) / elapsed_s if elapsed_s > 0 else 0.0

    def levels(self, times_s: Sequence[float], step: float, max_rate: float | None) -> list[Level]:
        """Return the counter at times not before the first edge. Needs at least two edges."""
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
        left = floor if floor == last else self._left(floor, time_s)
        systematic = 0.0
        if left < last:
            mid, systematic = self._inside(left, time_s)
        else:
            mid = self.units[last] + self._trend() * (time_s - self._mid_s(last))
        low = self.units[floor]
        if ceiling <= last:
            provisional = not self.is_final(time_s)
            high = max(self.units[ceiling], low) + step
        else:
            provisional = True
            rate = 2 * self._trend() if max_rate is None else max_rate
            high = self.units[last] + step + rate * (time_s - self.before_s[last])
        mid = max(low, min(mid, high))
        systematic = min(systematic, max(high - mid, mid - low))
        return Level(low, mid, high, provisional, systematic)

    def _left(self, floor: int, time_s: float) -> int:
        """Return the last edge whose middle is not after this time. ``floor`` is an edge where the search can begin."""
        left, last = floor, len(self.units) - 1
        while left < last and self._mid_s(left + 1) <= time_s:
            left += 1
        return left

    def is_final(self, time_s: float) -> bool:
        """Whether the level at this time is final.

        It is final once a later edge was seen. If work begins or ends between the edges before and
        after this time, the power after that work must be known, too.
        """
        if not self.before_s or self.before_s[-1] < time_s:
            return False
        left = self._left(max(bisect_right(self.seen_s, time_s) - 1, 0), time_s)
        if left + 1 >= len(self.units):
            return True
        start_s, end_s = self._mid_s(left), self._mid_s(left + 1)
        return self.looked_s >= end_s + _AFTER_S or not 0 < self._activity.busy_s(start_s, end_s) < end_s - start_s

    def _inside(self, left: int, time_s: float) -> tuple[float, float]:
        """Return E(t) between an edge and the next, and its systematic error.

        The time of an edge is only known to lie in an interval of length w (seen - before). The
        middle of the interval is used; it is up to w/2 too late or too early.

        - If edges are T apart, T > w, they are at random places in their intervals. Then, on average, an energy of
          P w² / 8T is on the wrong side of the start or the end of work of power P.
        - If edges are closer, the counter is always late by the same time, up to w/2, at start and end alike. The
          error is P w / 4 at each end of a window, P w / 2 in all.
        - Where E(t) is a straight line, the error grows by T times a sixth of the change of the power.
        """
        start_s, end_s = self._mid_s(left), self._mid_s(left + 1)
        flowed = self.units[left + 1] - self.units[left]
        span_s = end_s - start_s
        activity = self._activity
        line = self.units[left] + (time_s - start_s) / span_s * flowed
        if start_s < activity.known_from_s:
            return line, flowed / 6
        busy_s = activity.busy_s(start_s, end_s)
        idle_s = span_s - busy_s
        if busy_s <= 0 or flowed <= 0:
            return line, 0.0
        late_s = max(self.seen_s[index] - self.before_s[index] for index in (left, left + 1))
        blur_s = late_s**2 / (8 * span_s) if span_s > late_s else late_s / 4
        near = max(round(late_s / span_s), 1)  # work may show up at edges this many places away
        if idle_s <= 0:
            change = abs(self._power(left - near, left, 0.0) - self._power(left + 1, left + 1 + near, 0.0))
            return line, change * (span_s / 6 + blur_s)
        idle = self._idle.before(activity.next_begin_s(start_s), self, activity)
        if idle is None:  # idle power is unknown, but at least 0
            return line, self._power(left - near, left + 1 + near, 0.0) * (span_s / 6 + blur_s)
        power = self._power(left - near, left + 1 + near, idle[1].rate)
        rest, busy_part = flowed, activity.busy_s(start_s, time_s) / busy_s
        mid, error = self.units[left], power * blur_s
        gaps = [(gap, self._gap_rate(left, gap, idle, power)) for gap in activity.gaps(start_s, end_s)]
        most = sum(rate.rate * _overlap_s(gap, start_s, end_s) for gap, rate in gaps)
        scale = min(1.0, flowed / most) if most > 0 else 1.0
        for gap, rate in gaps:
            gap_s, passed_s = _overlap_s(gap, start_s, end_s), _overlap_s(gap, start_s, time_s)
            mid += scale * rate.rate * passed_s
            rest -= scale * rate.rate * gap_s
            error += rate.error * abs(passed_s - gap_s * busy_part)
        return mid + max(rest, 0.0) * busy_part, error

    def _gap_rate(self, left: int, gap: tuple[float, float], idle: tuple[float, _IdleRate], power: float) -> _IdleRate:
        """Return the rate of an idle time that lies wholly or partly between an edge and the next.

        A tick is the time between two successive edges. The rate is that of the nearest tick that
        lies wholly in the same idle time. If the power is still changing there, the rate may be
        wrong by its change from one tick to the next. Without such a tick, the true rate can be
        anything between the rate of the last idle time and the ``power`` of the work.
        """
        until_s, long = idle
        if until_s == gap[1]:
            return long
        if gap[0] <= self._mid_s(left):
            near = self._ticks(left - 1, -1, gap)
        else:
            near = self._ticks(left + 1, 1, (gap[0], min(gap[1], self._mid_s(left + 1) + _AFTER_S)))
        if not near:
            return _IdleRate(long.rate, long.error + abs(power - long.rate))
        return _IdleRate(near[0], abs(near[0] - (near[1] if len(near) > 1 else long.rate)))

    def _ticks(self, first: int, step: int, gap: tuple[float, float]) -> list[float]:
        """Return the rates of up to two successive ticks inside an idle time, the nearest first.

        A flat stretch (no rise) counts even if it reaches beyond the idle time. Otherwise the result would change
        later, because the last edge moves as long as the stretch goes on.
        """
        rates: list[float] = []
        for left in (first, first + step):
            if left < 0 or left + 1 >= len(self.units):
                break
            flowed, start_s, end_s = self.units[left + 1] - self.units[left], self._mid_s(left), self._mid_s(left + 1)
            if flowed > 0 and (start_s < gap[0] or end_s > gap[1]):
                break
            rates.append(flowed / (end_s - start_s))
        return rates

    def _power(self, first: int, last: int, idle_rate: float) -> float:
        """Return the units per second of the busy time between two edges; 0 if there is none."""
        first, last = max(first, 0), min(last, len(self.units) - 1)
        start_s, end_s = self._mid_s(first), self._mid_s(last)
        busy_s = self._activity.busy_s(start_s, end_s)
        flowed = self.units[last] - self.units[first] - idle_rate * (end_s - start_s - busy_s)
        return max(flowed, 0.0) / busy_s if busy_s > 0 else 0.0

    def rate_between(self, start_s: float, end_s: float) -> _IdleRate | None:
        """Return the units per second by the edges wholly between two times; None if these span too little time."""
        first = bisect_left(self.before_s, start_s)
        last = bisect_right(self.seen_s, end_s) - 1
        if last <= first or self.before_s[last] - self.seen_s[first] < _IDLE_S:
            return None
        flowed = self.units[last] - self.units[first]
        rate = flowed / (self._mid_s(last) - self._mid_s(first))
        return _IdleRate(rate, flowed / (self.before_s[last] - self.seen_s[first]) - rate)


def _overlap_s(gap: tuple[float, float], start_s: float, end_s: float) -> float:
    return max(min(gap[1], end_s) - max(gap[0], start_s), 0.0)


class Track:
    """The bounded history of one counter. Not thread-safe: its owner locks.

    Args:
        max_age_s: Maximum age of a reading, seconds; None if unknown, and then only a changed reading makes an edge.
        step: The counter's smallest step, units: readings are rounded down by less than this.
        max_rate: Upper bound, units per second; None if unknown, and then twice the last rate is used.
        history_s: How far back windows can reach, seconds.
        stale_s: How long after the last edge a window may end, seconds.
        activity: When the hardware was at work; its owner keeps it up to date.
    """

    def __init__(
        self,
        *,
        max_age_s: float | None,
        step: float,
        max_rate: float | None,
        history_s: float,
        stale_s: float,
        activity: Activity | None = None,
    ) -> None:
        self._max_age_s = max_age_s
        self._step = step
        self.max_rate = max_rate
        self._history_s = history_s
        self._stale_s = stale_s
        self._activity = Activity() if activity is None else activity
        self._runs: deque[_Run] = deque([_Run(Flag.OUT_OF_HISTORY, self._activity)], maxlen=_MAX_RUNS)
        self._last_units: float | None = None
        self._last_asked_s = 0.0
        self._thin_at = 0
        self._period = UsualPeriod()

    def add(self, asked_s: float, answered_s: float, units: float) -> None:
        """Add a reading and the times when it was requested and answered. A lower reading breaks the history."""
        last = self._last_units
        if last is not None and units < last:
            self.lost(Flag.COUNTER_RESET)
            last = None
        run = self._runs[-1]
        run.looked(asked_s)
        if self._max_age_s is not None:
            # Each reading is fresh, so equal readings prove that nothing flowed: keep the first and the last of them.
            self._period.add(asked_s - self._max_age_s, answered_s)
            if len(run.units) > 1 and run.units[-2] == run.units[-1] == units:
                run.stay(asked_s - self._max_age_s, answered_s)
            else:
                run.append(asked_s - self._max_age_s, answered_s, units)
        elif last is not None and units > last:
            run.append(self._last_asked_s, answered_s, units)
            self._period.add(self._last_asked_s, answered_s)
        self._last_units, self._last_asked_s = units, asked_s
        if len(run.units) > self._thin_at and len(run.units) > 1:
            run.thin(self._history_s)
            # Thin again when there are half as many edges more, so that the mean cost per reading is constant.
            self._thin_at = len(run.units) + max(len(run.units) // 2, 1000)

    @property
    def citable_s(self) -> float | None:
        """How long a window must be so that this counter proves some of its energy (`UsualPeriod`), seconds."""
        return self._period.citable_s

    def lost(self, why: Flag) -> None:
        """Break the history: windows that span this moment are unknown, with the flag ``why``."""
        self._runs[-1].looked(math.inf)
        self._runs.append(_Run(why, self._activity))
        self._last_units = None
        self._period.restart()
        self._thin_at = 0

    def is_final(self, time_s: float) -> bool:
        """Whether a window that ends at this time is final."""
        return any(run.is_final(time_s) for run in self._runs)

    def levels(self, times_s: Sequence[float]) -> list[Level]:
        """Return the counter at each of these times (one or more, in any order).

        Raises:
            NoWindow: They are not all inside one unbroken stretch of the history.
        """
        first_s, last_s = min(times_s), max(times_s)
        why = Flag.OUT_OF_HISTORY
        for run in reversed(self._runs):
            if run.seen_s and run.seen_s[0] <= first_s:
                break
            why = run.why
        else:
            # A counter that answers but never moves has its own flag.
            raise NoWindow(Flag.NO_EDGE if len(self._runs) == 1 and not run.seen_s else why)
        if run is not self._runs[-1] and last_s > run.before_s[-1]:
            raise NoWindow(why)
        if len(run.units) < 2:
            raise NoWindow(Flag.NO_EDGE)
        if last_s > run.seen_s[-1] + self._stale_s:
            raise NoWindow(Flag.STALE)
        return run.levels(times_s, self._step, self.max_rate)
