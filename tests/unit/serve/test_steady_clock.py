"""The registry's clock does not jump with the wall clock."""

from __future__ import annotations

from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from deployments.energy.record_dates import MAX_RATE
from deployments.serve.steady_clock import SteadyClock
from tests.support.fake_counters import ManualClock

UTC_S = 1_800_000_000.0


class Clocks:
    """A monotonic clock, and a wall clock that is ahead of it by ``offset_s``."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.offset_s = UTC_S
        self.steady = SteadyClock(self.clock, lambda: self.clock.now_s + self.offset_s)

    def after(self, seconds: float) -> float:
        self.clock.now_s += seconds
        return self.steady()


@pytest.mark.parametrize("step_s", [3600.0, -3600.0, 100 * 86_400.0])
def test_an_hour_takes_an_hour(step_s: float) -> None:
    """The wall clock is set by an hour, or by 100 days: what is an hour away is still an hour away, but for the drift.

    Dates follow by 500 µs a second at most: 1.8 s in an hour.
    """
    clocks = Clocks()
    begun_s = clocks.steady()
    clocks.offset_s += step_s
    times = [clocks.after(1.0) for _ in range(3600)]
    assert times[-1] - begun_s == pytest.approx(3600.0, abs=3600 * MAX_RATE + 1e-3)
    assert all(later > earlier for earlier, later in pairwise(times))


def test_a_step_is_logged_once() -> None:
    """An operator reads that the wall clock was set, by how much, and once."""
    clocks = Clocks()
    with capture_logs() as logs:
        clocks.after(1.0)
        clocks.offset_s += 60.0
        for _ in range(5):
            clocks.after(1.0)
    (line,) = logs
    assert (line["log_level"], line["step_s"]) == ("warning", pytest.approx(60.0, abs=0.01))


def test_it_is_utc() -> None:
    """Without steps it is the wall clock's time."""
    clocks = Clocks()
    begun_s = UTC_S + clocks.clock.now_s
    assert clocks.steady() == begun_s
    assert clocks.after(1000.0) == begun_s + 1000.0
