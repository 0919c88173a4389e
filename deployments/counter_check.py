"""Whether an energy counter can be believed: its first seconds against the power that the hardware tells. Pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise

CHECK_S = 10.0
"""How long a counter is watched after the start; over this time steps of 100 ms are 1 %."""
TOLERANCE = 0.10
"""Counter and integrated power may differ by this part: NVML's power is good to 5 %, and smeared over a second."""


@dataclass(frozen=True, slots=True)
class Check:
    """What was found of a counter.

    ``period_s`` is the median time between two of its steps as the poller sees them, None if it never made two.
    ``counter_j`` and ``power_j`` are its own joules and those of the power samples over the same ``seconds``;
    ``agrees`` is None where no power is told.
    """

    source: str
    seconds: float
    period_s: float | None
    counter_j: float | None
    power_j: float | None
    agrees: bool | None


class CounterCheck:
    """Watches one counter from its first step on; ``found`` is None until it has been watched for long enough."""

    def __init__(self, source: str) -> None:
        self.found: Check | None = None
        self._source = source
        self.restart()

    def restart(self) -> None:
        """Forget what was seen: the counter's history has a hole."""
        self._steps: list[tuple[float, float, float]] = []
        self._begun_s: float | None = None
        self._last: tuple[float, float, float | None] | None = None
        self._power_j = 0.0
        self._power_told = True

    def add(self, now_s: float, joules: float, power_w: float | None) -> None:
        """Take a reading, and the power at the same time, None if it is not told."""
        if self._begun_s is None:
            self._begun_s = now_s
        last, self._last = self._last, (now_s, joules, power_w)
        if last is not None:
            if power_w is None or last[2] is None:
                self._power_told = False
            else:
                self._power_j += (now_s - last[0]) * (last[2] + power_w) / 2
            if joules != last[1]:
                self._steps.append((now_s, joules, self._power_j))
        if now_s - self._begun_s >= CHECK_S:
            self.found = self._look()

    def _look(self) -> Check:
        if len(self._steps) < 2:
            return Check(self._source, CHECK_S, None, None, None, None)
        (first_s, first_j, first_power_j), (last_s, last_j, last_power_j) = self._steps[0], self._steps[-1]
        period_s = statistics.median(later[0] - earlier[0] for earlier, later in pairwise(self._steps))
        counter_j, power_j = last_j - first_j, last_power_j - first_power_j
        if not self._power_told or power_j <= 0:
            return Check(self._source, last_s - first_s, period_s, counter_j, None, None)
        agrees = abs(counter_j / power_j - 1) <= TOLERANCE
        return Check(self._source, last_s - first_s, period_s, counter_j, power_j, agrees)
