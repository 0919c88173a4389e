"""Counts of callers in windows of time, with a bound on their memory."""

from __future__ import annotations

import threading

import pytest

from deployments.serve import rates
from deployments.serve.rates import MOST_CALLERS, Rate, Windows, per_minute, per_second
from tests.support.fake_counters import ManualClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    clock = ManualClock()
    monkeypatch.setattr(rates, "monotonic", clock)
    return clock


def test_a_caller_waits_for_the_end_of_its_window(clock: ManualClock) -> None:
    """The window begins with the first call; above the limit the answer is the time until its end, then it counts."""
    rate = per_minute(2)
    assert rate.count("a") is None
    clock.now_s += 20
    assert rate.count("a") is None
    assert rate.used_up("a") == pytest.approx(40)
    assert rate.count("a") == pytest.approx(40)
    assert rate.count("b") is None, "others are not concerned"
    clock.now_s += 39.9
    assert rate.count("a") == pytest.approx(0.1)
    clock.now_s += 0.2
    assert rate.used_up("a") is None
    assert rate.count("a") is None


def test_a_second_is_a_second(clock: ManualClock) -> None:
    """A limit per second has windows of one second."""
    rate = per_second(1)
    assert rate.count("a") is None
    assert rate.count("a") == pytest.approx(1)
    clock.now_s += 1
    assert rate.count("a") is None


@pytest.mark.parametrize("rate", [per_second(None), per_minute(None)])
def test_without_a_limit_all_may(rate: Rate) -> None:
    """None is no limit."""
    assert [rate.count("a") for _ in range(1000)] == [None] * 1000
    assert rate.used_up("a") is None


def test_looking_counts_nothing(clock: ManualClock) -> None:
    """Whether a limit is used up can be asked as often as one likes."""
    rate = per_second(1)
    assert [rate.used_up("a") for _ in range(10)] == [None] * 10
    assert rate.count("a") is None


def test_memory_is_bounded(clock: ManualClock) -> None:
    """Of more callers than are kept, the one whose window began first is forgotten; no thread cleans up."""
    windows, threads = Windows(), threading.active_count()
    for number in range(3 * MOST_CALLERS):
        windows.incr(str(number), 60)
    assert threading.active_count() == threads
    assert windows.get(str(2 * MOST_CALLERS - 1)) == 0
    assert windows.get(str(2 * MOST_CALLERS)) == 1
    assert windows.reset() == MOST_CALLERS
    assert windows.reset() == 0


def test_a_new_window_is_the_youngest(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller whose window begins again is not the next to be forgotten."""
    monkeypatch.setattr(rates, "MOST_CALLERS", 2)
    windows = Windows()
    windows.incr("a", 1)
    clock.now_s += 0.5
    windows.incr("b", 1)
    clock.now_s += 0.6
    windows.incr("a", 1)
    windows.incr("c", 1)
    assert [windows.get(caller) for caller in "abc"] == [1, 0, 1]


def test_a_storage_as_the_library_wants_it(clock: ManualClock) -> None:
    """What the library can ask of a storage beyond its counts."""
    windows = Windows()
    assert windows.check()
    assert windows.get_expiry("a") == clock.now_s
    assert windows.incr("a", 5, amount=3) == 3
    assert windows.get_expiry("a") == clock.now_s + 5
    windows.clear("a")
    assert windows.get("a") == 0
