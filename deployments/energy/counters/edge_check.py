"""Proves each step of a counter by its own power. Pure."""

from __future__ import annotations

from deployments.energy.counters.base import CounterLost


class EdgeCheck:
    """Compares what one counter goes up by with the time that this can have taken.

    A step that no hardware can explain is no energy: a counter that jumps, falls or was reset has a hole in its
    history there, and no window over the hole gets a figure.

    Args:
        max_age_s: How old a reading can be, seconds; None if not known, and then a step began after the last reading
            before the step before it.
        step: The counter's smallest step, in its units.
    """

    def __init__(self, max_age_s: float | None, step: float) -> None:
        self._max_age_s = max_age_s
        self._step = step
        self.restart()

    def restart(self) -> None:
        """Begin again with the next reading: the counter's history has a hole."""
        self._last: float | None = None
        self._since_s: float | None = None
        self._asked_s = 0.0

    def plausible(self, answered_s: float, units: float, max_rate: float | None) -> bool:
        """Whether a reading that was answered at this time is no more above the last than ``max_rate`` explains."""
        if self._last is None or self._since_s is None or max_rate is None:
            return True
        return units - self._last <= max_rate * (answered_s - self._since_s) + self._step

    def add(self, asked_s: float, answered_s: float, units: float, max_rate: float | None) -> None:
        """Take a reading that was asked for and answered at these times.

        More than ``max_rate`` units a second can't be; if that is None, not known, only a fall is refused.

        Raises:
            CounterLost: ``counter_reset`` if it fell, ``implausible_power`` if it rose by too much. The next reading
                begins a new history.
        """
        last = self._last
        if last is not None and units < last:
            self.restart()
            raise CounterLost("counter_reset")
        if not self.plausible(answered_s, units, max_rate):
            self.restart()
            raise CounterLost("implausible_power")
        if self._max_age_s is not None:
            self._since_s = asked_s - self._max_age_s
        elif last is not None and units > last:
            self._since_s = self._asked_s
        self._last, self._asked_s = units, asked_s
