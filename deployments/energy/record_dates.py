"""UTC dates for the records of one process, which do not jump or overlap when the wall clock is set. Pure.

All times are read from the monotonic clock. The difference between UTC and this clock is taken when
the process starts. Later it follows the wall clock, at no more than `MAX_RATE`. The rate
changes from time to time, and the last `_MAX_PIECES` pieces of constant rate are kept. A date in
them never changes: the same time always has the same date.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

MAX_RATE = 500e-6
"""How fast dates follow the wall clock, seconds per second: as fast as the kernel slews a clock."""
TOLERANCE_S = 0.25
"""A larger change of the wall clock between two looks is a step, seconds."""
_NOISE_S = 0.01
"""A smaller difference is not followed, seconds: two clocks can't be read at one moment."""
_MAX_PIECES = 4096
_MAX_STEPS = 1000


@dataclass(frozen=True, slots=True)
class _Piece:
    """From a monotonic time on: the UTC second at that time, and UTC seconds per monotonic second."""

    from_s: float
    utc_s: float
    rate: float


@dataclass(frozen=True, slots=True)
class _Step:
    """A step of the wall clock between two monotonic times; after it, UTC minus monotonic time is ``offset_s``."""

    before_s: float
    after_s: float
    offset_s: float


# D62: dates don't jump
class RecordDates:
    """Turns monotonic seconds into UTC seconds. Not thread-safe.

    ``clock`` returns monotonic seconds, ``utc_s`` seconds of the wall clock.
    """

    def __init__(self, clock: Callable[[], float], utc_s: Callable[[], float]) -> None:
        self._clock = clock
        self._utc_s = utc_s
        now_s = clock()
        utc_now_s = utc_s()
        self._pieces = [_Piece(now_s, utc_now_s, 1.0)]
        self._looked_s = now_s
        self._steps: list[_Step] = [_Step(now_s, now_s, utc_now_s - now_s)]

    def look(self) -> float | None:
        """Let the dates of later times follow the wall clock. Call this every few seconds.

        Returns by how many seconds the wall clock was set since the last call, None if it was not.
        """
        now_s = self._clock()
        utc_now_s = self._utc_s()
        offset_s, step_s = utc_now_s - now_s, None
        if abs(offset_s - self._steps[-1].offset_s) > TOLERANCE_S:
            step_s = offset_s - self._steps[-1].offset_s
            self._steps.append(_Step(self._looked_s, now_s, offset_s))
            del self._steps[:-_MAX_STEPS]
        self._looked_s = now_s
        rate, dated_s = self._piece(now_s).rate, self.utc_s(now_s)
        error_s = utc_now_s - dated_s
        wanted = 1.0 if abs(error_s) < _NOISE_S else 1.0 + math.copysign(MAX_RATE, error_s)
        if rate == wanted == 1.0:
            return step_s
        while self._pieces[-1].from_s > now_s:
            self._pieces.pop()
        if rate != wanted:
            self._pieces.append(_Piece(now_s, dated_s, wanted))
        if wanted != 1.0:  # this rate ends when the date has caught up, even without a further look
            takes_s = abs(error_s) / MAX_RATE
            self._pieces.append(_Piece(now_s + takes_s, dated_s + wanted * takes_s, 1.0))
        del self._pieces[:-_MAX_PIECES]
        return step_s

    def utc_s(self, at_s: float) -> float:
        """Return the UTC second of a monotonic time. Later times have later dates, whatever the wall clock does."""
        piece = self._piece(at_s)
        return piece.utc_s + (at_s - piece.from_s) * piece.rate

    def stepped(self, begun_s: float, ended_s: float) -> bool:
        """Whether the wall clock was set between two times, or the date of ``ended_s`` is off by > TOLERANCE_S."""
        if any(step.before_s < ended_s and begun_s < step.after_s for step in self._steps[1:]):
            return True
        before = [step for step in self._steps if step.after_s <= ended_s] or self._steps[:1]
        return abs(self.utc_s(ended_s) - (ended_s + before[-1].offset_s)) > TOLERANCE_S

    def _piece(self, at_s: float) -> _Piece:
        index = bisect_right(self._pieces, at_s, key=lambda piece: piece.from_s) - 1
        return self._pieces[max(index, 0)]
