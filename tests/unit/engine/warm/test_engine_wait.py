from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.warm.spin_wait import AWAKE_S, LONGEST_SLEEP_S, POLL_S, SHORTEST_SLEEP_S, Patience, be_patient

LOOK_S = 0.000_02
"""How long a look takes that finds nothing, and giving way."""


class Reader:
    """Reads messages that come after given times, in time of its own; notes how long it slept, and how late it was."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept_s: list[float] = []
        self.patience = Patience(clock=lambda: self.now_s, sleep=self.sleep, give_way=self.give_way)

    def sleep(self, duration_s: float) -> None:
        self.slept_s.append(duration_s)
        self.now_s += duration_s

    def give_way(self) -> None:
        self.now_s += LOOK_S

    def late_s(self, after_s: float) -> float:
        """Wait for a message; how long it has been there when it is seen, seconds."""
        there_s = self.now_s + after_s
        while self.now_s < there_s:
            self.patience.pause()
        self.patience.came()
        return self.now_s - there_s

    def late(self, waits_s: Sequence[float]) -> list[float]:
        return [self.late_s(after_s) for after_s in waits_s]


def test_asleep_for_half_of_what_it_takes() -> None:
    """A reader whose messages take their time sleeps for half of it, and sees them at once."""
    reader = Reader()
    assert max(reader.late([0.004] * 50)) <= 2 * LOOK_S
    assert sum(reader.slept_s) == pytest.approx(49 * 0.002, rel=0.02)


@pytest.mark.parametrize("quick_s", [0.0, 2 * SHORTEST_SLEEP_S])
def test_awake_where_messages_come_at_once(quick_s: float) -> None:
    """One message that was there already, or came while its reader slept, and nobody sleeps until it is forgotten."""
    reader = Reader()
    reader.late([0.004] * 9)
    reader.late([quick_s])
    reader.slept_s.clear()
    reader.late([0.004] * 8)
    assert reader.slept_s == []
    reader.late([0.004])
    assert reader.slept_s == [pytest.approx(0.002, rel=0.02)]


def test_looks_now_and_then_when_nothing_comes() -> None:
    """A long wait is spent asleep, a message is seen soon all the same, and it does not count as what it takes."""
    reader = Reader()
    assert reader.late_s(1.0) <= POLL_S
    assert set(reader.slept_s) == {POLL_S}
    assert sum(reader.slept_s) == pytest.approx(1.0 - AWAKE_S, rel=0.01)
    reader.slept_s.clear()
    reader.late_s(0.004)
    assert reader.slept_s == []


@settings(deadline=None)
@given(st.lists(st.one_of(st.floats(0.0, 0.005), st.floats(0.0, 0.03), st.floats(0.09, 0.12)), max_size=16))
def test_is_late_by_no_more_than_it_sleeps(waits_s: list[float]) -> None:
    """Whatever comes when: nobody sleeps longer than half of the shortest of the last waits, and not twice too long."""
    reader = Reader()
    late_s = 0.0
    lately: list[float] = []
    for after_s in waits_s:
        before_s, late_s = late_s, reader.late_s(after_s)
        if after_s > AWAKE_S - LOOK_S:
            assert late_s <= POLL_S
            late_s = 0.0
        else:
            assert late_s <= min(min(lately[-8:], default=0.0) / 2, LONGEST_SLEEP_S) + 2 * LOOK_S
            assert min(before_s, late_s) <= 2 * LOOK_S
            lately.append(after_s)


def test_idle_readers_wait_as_before() -> None:
    """After a second without a message vLLM's own wait is used, which takes no time at all."""

    class Condition:
        def __init__(self, busy_loop_s: float) -> None:
            self.busy_loop_s, self.last_read, self.waits = busy_loop_s, time.monotonic(), 0

        def wait(self, timeout_ms: int | None = None) -> None:
            self.waits += 1

        def record_read(self) -> None:
            self.last_read = time.monotonic()

    be_patient(Condition)
    for busy_loop_s, waits in ((60.0, 0), (-1.0, 1)):
        condition = Condition(busy_loop_s)
        last_read_s = condition.last_read
        condition.wait(timeout_ms=5)
        condition.record_read()
        assert condition.waits == waits
        assert condition.last_read > last_read_s
