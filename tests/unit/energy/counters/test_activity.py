from __future__ import annotations

import math

import pytest

from deployments.energy.counters import activity as activity_module
from deployments.energy.counters.activity import Activity


def of(*intervals: tuple[float, float]) -> Activity:
    """What was at work in these intervals, one after the other."""
    activity = Activity()
    for begin_s, end_s in intervals:
        activity.begin(begin_s)
        activity.end(end_s)
    return activity


def test_seconds_at_work() -> None:
    """Of 0 to 10 s with work from 1 to 3 and from 5 to 6, 3 s were at work; of 2 to 5.5 s, 1.5."""
    activity = of((1.0, 3.0), (5.0, 6.0))
    assert activity.busy_s(0.0, 10.0) == 3.0
    assert activity.busy_s(2.0, 5.5) == 1.5
    assert activity.busy_s(3.0, 5.0) == 0.0


def test_work_that_overlaps_counts_once() -> None:
    """Two prompts from 1 to 3 and from 2 to 4 are one time at work, of 3 s."""
    activity = Activity()
    activity.begin(1.0)
    activity.begin(2.0)
    activity.end(3.0)
    assert activity.busy_s(0.0, 3.5) == 2.5  # it goes on
    activity.end(4.0)
    assert activity.busy_s(0.0, 9.0) == 3.0


def test_work_without_a_pause_is_one_interval() -> None:
    """A prompt that begins when the last one ends leaves no idle time between them."""
    activity = of((1.0, 2.0), (2.0, 3.0), (4.0, 5.0))
    assert list(activity.idle(0.0, 9.0)) == [(-math.inf, 1.0), (3.0, 4.0)]
    assert activity.busy_s(0.0, 9.0) == 3.0


def test_idle_intervals_in_part() -> None:
    """Idle intervals are told by their ends: after the first time, and not after the second."""
    activity = of((1.0, 2.0), (3.0, 4.0), (5.0, 6.0))
    assert list(activity.idle(1.0, 3.0)) == [(2.0, 3.0)]
    assert list(activity.idle(3.0, 4.9)) == []


def test_next_begin() -> None:
    """The begin of the work of a time, or of the next work after it."""
    activity = of((1.0, 2.0), (3.0, 4.0))
    assert [activity.next_begin_s(at_s) for at_s in (0.0, 1.5, 2.5, 4.5)] == [1.0, 1.0, 3.0, math.inf]


def test_memory_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old intervals are forgotten, and it is known from when on all are there."""
    monkeypatch.setattr(activity_module, "KEPT_INTERVALS", 10)
    activity = of(*[(float(second), second + 0.5) for second in range(21)])
    assert activity.known_from_s == 9.5
    assert activity.busy_s(9.5, 30.0) == pytest.approx(11 * 0.5)
    assert next(activity.idle(-math.inf, 10.0)) == (9.5, 10.0)


def test_gaps_are_told_whole() -> None:
    """Work from 2 to 3 s and from 5 to 6 s: from 2.5 to 5.5 s there is one gap, of 3 to 5 s; the last has no end."""
    activity = Activity()
    for begin_s in (2.0, 5.0):
        activity.begin(begin_s)
        activity.end(begin_s + 1)
    assert list(activity.gaps(2.5, 5.5)) == [(3.0, 5.0)]
    assert list(activity.gaps(1.0, 2.5)) == [(-math.inf, 2.0)]
    assert list(activity.gaps(4.0, 7.0)) == [(3.0, 5.0), (6.0, math.inf)]
    assert list(activity.gaps(2.1, 2.9)) == []
    activity.begin(8.0)
    assert list(activity.gaps(7.0, 9.0)) == [(6.0, 8.0)]


def test_lengths_of_the_work_near_a_time() -> None:
    """Work from 2 to 3 s, and from 5 s on: what overlaps a time or touches it is told by its whole length."""
    activity = Activity()
    activity.begin(2.0)
    activity.end(3.0)
    activity.begin(5.0)
    assert list(activity.lengths_s(3.0, 4.0)) == [1.0]
    assert list(activity.lengths_s(3.1, 4.9)) == []
    assert list(activity.lengths_s(0.0, 9.0)) == [1.0, math.inf]
