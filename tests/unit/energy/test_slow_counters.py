"""Windows of counters that are slower than what they measure, or stand still."""

from __future__ import annotations

import pytest

from deployments.energy import window_writer
from registry.wire.labels import Label
from registry.wire.words import WindowKind
from tests.support.fake_counters import FakeCounter, Ticks
from tests.support.meter_bench import LEASE, WATTS, Make, detail, of_kind


async def test_lease_and_start_shorter_than_the_counter(make: Make) -> None:
    """A lease and a start that the counter is too slow for are modelled and flagged, as the prompts in them are.

    A counter of 100 ms at 100 W: a start of 0.1 s and a lease that is one prompt of 0.1 s are 10 J each. As each can
    lie in two ticks of 10 J, they are 0 to 20 J.
    """
    ticks = Ticks(lambda now_s: WATTS * now_s, [0.1 * tick for tick in range(11_000)], 1e-3)
    made = make(FakeCounter(ticks, name="gpu:GPU-x", label=Label.SIMULATED, max_age_s=None, step=1e-3, limit_w=700.0))
    made.passes(2.0)
    with made.meter.load("x"):
        made.passes(0.1)
    made.passes(1.0)
    made.bind(LEASE)
    made.prompt(0.1)
    made.bind(None)
    made.passes(0.5)  # until the power after the prompt is known
    windows = await made.windows()
    [load], [lease], [prompt] = (
        of_kind(windows, kind) for kind in (WindowKind.LOAD, WindowKind.LEASE, WindowKind.PROMPT)
    )
    for window in (load, lease):
        energy = detail(window)["energy"]
        assert window.total_j == pytest.approx(10.0)
        assert energy["low_j"] <= 0.1
        assert energy["high_j"] == pytest.approx(20.0, abs=0.1)
        assert "too_short" in detail(window)["flags"]
    assert lease.total_j == pytest.approx(prompt.total_j)


async def test_counter_that_stands_still_for_a_while(make: Make) -> None:
    """No window is written while its counter stands still: afterwards prompts and idle time are exactly the lease.

    100 W; the counter stands still from 1005 to 1012 s, in which two prompts of 1 s are answered. The lease of three
    times 1 + 1 + 0.2 s, 0.2 s and 6 s is 12.8 s: 1,280 J, of which 700 J show at once.
    """
    still = FakeCounter(lambda now_s: WATTS * (now_s if not 1005 < now_s < 1012 else 1005.0), name="gpu:GPU-x",
                        label=Label.SIMULATED, max_age_s=None)  # fmt: skip
    made = make(still)
    made.passes(2.0)
    made.bind(LEASE)
    for _ in range(3):
        made.passes(1.0)
        made.prompt(1.0)
        await made.windows()
    assert made.clock.now_s < 1012
    assert len(await made.windows()) <= 3
    made.passes(6.0)
    made.bind(None)
    made.passes(1.0)
    windows = await made.windows()
    [lease] = of_kind(windows, WindowKind.LEASE)
    own = [window for window in windows if window.request_id == "request-1" and window is not lease]
    assert len(of_kind(windows, WindowKind.PROMPT)) == 3
    assert not any("provisional" in detail(window)["flags"] for window in windows)
    assert None not in [window.total_j for window in own]
    assert lease.total_j == pytest.approx(1280.0)
    assert sum(window.total_j or 0.0 for window in own) == pytest.approx(lease.total_j, rel=1e-9)


async def test_counter_that_does_not_come_back(make: Make) -> None:
    """What a dead counter has not told after `READINGS_S` is unavailable and says so, rather than extrapolated."""
    made = make(FakeCounter(lambda now_s: WATTS * min(now_s, 1003.0), name="gpu:GPU-x",
                            label=Label.SIMULATED, max_age_s=None))  # fmt: skip
    made.passes(2.0)
    made.bind(LEASE)
    made.prompt(1.2)
    assert of_kind(await made.windows(), WindowKind.PROMPT) == []
    made.passes(window_writer.READINGS_S)
    [prompt] = of_kind(await made.windows(), WindowKind.PROMPT)
    assert prompt.total_j is None
    assert "stale" in detail(prompt)["flags"]
