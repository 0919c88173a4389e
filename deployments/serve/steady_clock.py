"""The registry's clock: UTC seconds in which a lease of an hour takes an hour, whatever is done to the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from deployments.energy.record_dates import RecordDates

LOOK_EVERY_S = 1.0
"""How often the wall clock is looked at, seconds; the registry asks for the time more often than that."""

log = structlog.get_logger("deployments.serve.steady_clock")


class SteadyClock:
    """UTC seconds, anchored to the monotonic clock when it is made. Follows the wall clock slowly, and never jumps.

    A wall clock that is set is logged, and taken over by the next start of the registry. ``clock`` gives
    monotonic seconds, ``utc_s`` those of the wall clock. Not thread-safe.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, utc_s: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._dates = RecordDates(clock, utc_s)
        self._looked_s = clock()

    def __call__(self) -> float:
        """Return the UTC second of now. Later calls return no earlier one."""
        now_s = self._clock()
        if now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            if (step_s := self._dates.look()) is not None:
                log.warning("the wall clock was set; times and deadlines go on as before", step_s=round(step_s, 3))
        return self._dates.utc_s(now_s)
