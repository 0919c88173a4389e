"""UTC dates for the records of one process: steps of the wall clock don't make them jump or overlap. Pure.

The monotonic clock is read for all times. UTC is anchored to it once, when the process starts, and follows a wall clock
that says something else at no more than `MAX_RATE`. A date, once given, stays: the same time has the same date always.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

CLOCK_STEPPED: Final = "clock_stepped"
"""Flag: the wall clock was set while the window was open, or its dates are not yet those of the wall clock."""
MAX_RATE = 500e-6
"""How fast dates follow the wall clock, seconds a second: as fast as the kernel itself slews a clock."""
TOLERANCE_S = 0.25
"""A larger change between two looks is a step."""
_NOISE_S = 0.01
"""Two clocks can't be read at one moment; a smaller difference is not followed."""
_MAX_PIECES = 4096
_MAX_STEPS = 1000


@dataclass(frozen=True, slots=True)
class _Piece:
    """From this monotonic time on: a UTC second, and how many of those pass in one of ours."""

    from_s: float
    utc_s: float
    rate: float


@dataclass(frozen=True, slots=True)
class _Step:
    """The wall clock was set between two monotonic times; from then on it is so much ahead of ours."""

    before_s: float
    after_s: float
    offset_s: float


class RecordDates:
    """Turns monotonic seconds into UTC seconds.

    ``clock`` gives monotonic seconds, ``utc_s`` those of the wall clock. Not thread-safe.
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
        """Compare with the wall clock; dates of times from now on follow it. To be called every few seconds.

        Returns by how many seconds the wall clock was set since the last look, None if it was not.
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
        if wanted != 1.0:  # until it has caught up, also when nobody looks again
            takes_s = abs(error_s) / MAX_RATE
            self._pieces.append(_Piece(now_s + takes_s, dated_s + wanted * takes_s, 1.0))
        del self._pieces[:-_MAX_PIECES]
        return step_s

    def utc_s(self, at_s: float) -> float:
        """The UTC second of a monotonic time. Later times have later dates, whatever the wall clock does."""
        piece = self._piece(at_s)
        return piece.utc_s + (at_s - piece.from_s) * piece.rate

    def stepped(self, begun_s: float, ended_s: float) -> bool:
        """Whether the wall clock was set in a window between two monotonic times, or its dates are still off for it."""
        if any(step.before_s < ended_s and begun_s < step.after_s for step in self._steps[1:]):
            return True
        before = [step for step in self._steps if step.after_s <= ended_s] or self._steps[:1]
        return abs(self.utc_s(ended_s) - (ended_s + before[-1].offset_s)) > TOLERANCE_S

    def _piece(self, at_s: float) -> _Piece:
        index = bisect_right(self._pieces, at_s, key=lambda piece: piece.from_s) - 1
        return self._pieces[max(index, 0)]
