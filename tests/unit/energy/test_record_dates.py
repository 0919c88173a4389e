"""The dates of records, whatever is done to the wall clock."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.energy.record_dates import MAX_RATE, RecordDates
from tests.support.fake_counters import ManualClock

UTC_S = 1_800_000_000.0


class Clocks:
    """A monotonic clock at 1000 s, and a wall clock that can be set."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.offset_s = UTC_S - 1000.0
        self.dates = RecordDates(self.clock, lambda: self.clock.now_s + self.offset_s)

    def passes(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.now_s += 1.0
            self.dates.look()


def test_dates_are_those_of_a_wall_clock_that_is_left_alone() -> None:
    """Without a step a date is what the wall clock said, and no window is flagged."""
    made = Clocks()
    made.passes(100)
    assert made.dates.utc_s(1050.0) == UTC_S + 50.0
    assert not made.dates.stepped(1000.0, 1100.0)


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
def test_a_step_does_not_reach_the_dates(step_s: float) -> None:
    """The clock is set by an hour: a window of 10 s over it is 10 s long, give or take 5 ms, and is flagged.

    A window before the step is not; one long after it is, for as long as its dates are not the wall clock's.
    """
    made = Clocks()
    made.passes(50)
    made.offset_s += step_s
    made.passes(50)
    dates = made.dates
    assert dates.utc_s(1055.0) - dates.utc_s(1045.0) == pytest.approx(10.0, abs=10 * MAX_RATE)
    assert [dates.stepped(*times) for times in ((1010.0, 1049.0), (1045.0, 1055.0), (1090.0, 1099.0))] == [
        False, True, True
    ]  # fmt: skip


@pytest.mark.parametrize("step_s", [0.4, -0.4])
def test_dates_follow_the_wall_clock_slowly(step_s: float) -> None:
    """0.4 s at 500 ppm take 800 s: then the dates are the wall clock's, and stay so though nobody looks in between."""
    made = Clocks()
    made.offset_s += step_s
    made.passes(10)
    assert made.dates.utc_s(made.clock.now_s) == pytest.approx(UTC_S + 10.0 + 9 * MAX_RATE * step_s / 0.4, abs=1e-6)
    made.clock.now_s += 10_000.0
    made.dates.look()
    assert made.dates.utc_s(made.clock.now_s) == pytest.approx(UTC_S + 10_010.0 + step_s, abs=1e-6)
    assert not made.dates.stepped(made.clock.now_s - 10.0, made.clock.now_s)


@given(
    passing=st.lists(st.tuples(st.floats(0.01, 2000.0), st.one_of(st.just(0.0), st.floats(-1e5, 1e5))), max_size=40),
)
def test_dates_never_jump_and_never_change(passing: list[tuple[float, float]]) -> None:
    """However the wall clock is set: dates keep the order and, to 500 ppm, the distance of their times.

    A date that was given once is given again for the same time, so that windows that touch have the same date there.
    """
    made = Clocks()
    given_s = {1000.0: made.dates.utc_s(1000.0)}
    for seconds, step_s in passing:
        made.clock.now_s += seconds
        made.offset_s += step_s
        made.dates.look()
        given_s[made.clock.now_s] = made.dates.utc_s(made.clock.now_s)
    assert {at_s: made.dates.utc_s(at_s) for at_s in given_s} == given_s
    times = sorted(given_s)
    for before_s, after_s in pairwise(times):
        rate = (given_s[after_s] - given_s[before_s]) / (after_s - before_s)
        assert rate == pytest.approx(1.0, abs=MAX_RATE * 1.01 + 1e-6 / (after_s - before_s))
