"""The registry's clock: UTC seconds that do not jump, even if the wall clock is set."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from deployments.energy.record_dates import RecordDates

LOOK_EVERY_S = 1.0
"""Seconds between checks of the wall clock; the registry reads the time more often than that."""

log = structlog.get_logger("deployments.serve.steady_clock")


# D81: the registry's clock does not jump
class SteadyClock:
    """UTC seconds that advance with the monotonic clock, and follow the wall clock slowly.

    A step of the wall clock is logged, and followed no faster than ``RecordDates`` allows; a
    restarted registry uses the new time at once. ``clock`` returns monotonic seconds, ``utc_s`` wall
    clock seconds. Not thread-safe.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, utc_s: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._dates = RecordDates(clock, utc_s)
        self._looked_s = clock()

    def __call__(self) -> float:
        """Return the current UTC time in seconds; it never decreases."""
        now_s = self._clock()
        if now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            if (step_s := self._dates.look()) is not None:
                log.warning("the wall clock was set; times and deadlines do not jump", step_s=round(step_s, 3))
        return self._dates.utc_s(now_s)
