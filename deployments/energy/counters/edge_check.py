"""Checks that the power of each step of a counter is plausible. Pure."""

from __future__ import annotations

from deployments.energy.counters.base import CounterLost
from registry.wire.flags import Flag


class EdgeCheck:
    """Compares each rise of a counter with what the hardware can take in that time.

    A fall or an impossible rise (a jump, a reset) makes a gap in the counter's history. Windows across the gap get no
    figure.

    Args:
        max_age_s: Maximum age of a reading, seconds. If it is None (unknown), the time in which a rise may
            have happened begins with the last reading before the previous rise.
        step: The counter's smallest step, in its units.
    """

    def __init__(self, max_age_s: float | None, step: float) -> None:
        self._max_age_s = max_age_s
        self._step = step
        self.restart()

    def restart(self) -> None:
        """Begin again with the next reading, after a gap in the counter's history."""
        self._last: float | None = None
        self._since_s: float | None = None
        self._asked_s = 0.0

    def plausible(self, answered_s: float, units: float, max_rate: float | None) -> bool:
        """Whether ``max_rate`` explains the rise to this reading, which was answered at ``answered_s``."""
        if self._last is None or self._since_s is None or max_rate is None:
            return True
        return units - self._last <= max_rate * (answered_s - self._since_s) + self._step

    def add(self, asked_s: float, answered_s: float, units: float, max_rate: float | None) -> None:
        """Add a reading and the times when it was requested and answered.

        ``max_rate`` is the upper bound, units per second; if it is None (unknown), only a fall is refused.

        Raises:
            CounterLost: ``counter_reset`` if it fell, ``implausible_power`` if it rose by too much. The next reading
                begins a new history.
        """
        last = self._last
        if last is not None and units < last:
            self.restart()
            raise CounterLost(Flag.COUNTER_RESET)
        # D53: each step must be plausible by itself
        if not self.plausible(answered_s, units, max_rate):
            self.restart()
            raise CounterLost(Flag.IMPLAUSIBLE_POWER)
        if self._max_age_s is not None:
            self._since_s = asked_s - self._max_age_s
        elif last is not None and units > last:
            self._since_s = self._asked_s
        self._last, self._asked_s = units, asked_s
