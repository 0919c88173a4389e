"""Counts of callers in windows of time, with a bound on their memory."""

from __future__ import annotations

import pytest

from deployments.serve import rates
from deployments.serve.rates import Rate, per_minute, per_second
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


def test_memory_is_bounded(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more callers than are kept, the one whose window began first is forgotten."""
    monkeypatch.setattr(rates, "MOST_CALLERS", 2)
    rate = per_minute(1)
    assert [rate.count(caller) for caller in "abc"] == [None] * 3
    assert [rate.used_up(caller) is None for caller in "abc"] == [True, False, False]


def test_a_new_window_is_the_youngest(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller whose window begins again is not the next to be forgotten."""
    monkeypatch.setattr(rates, "MOST_CALLERS", 2)
    rate = per_second(1)
    rate.count("a")
    clock.now_s += 0.5
    rate.count("b")
    clock.now_s += 0.6
    rate.count("a")
    rate.count("c")
    assert [rate.used_up(caller) is None for caller in "abc"] == [False, True, False]
