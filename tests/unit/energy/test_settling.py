"""When a machine counts as being at rest. All joules here are a test double's, and labelled ``simulated``."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest

from deployments.energy.counters.probe import Unreadable
from deployments.energy.meter import Meter
from deployments.energy.settling import at_rest, warmed_up
from registry.settings import EnergySettings
from registry.wire.labels import Label
from tests.support.fake_counters import FakeCounter, ManualClock

SETTINGS = EnergySettings(settle_max_s=20.0, steady_cv=0.05)
START_S = 1000.0


class Bench:
    """A meter on a clock that goes on while somebody waits. ``watts`` is the machine's power at a time."""

    def __init__(self, *sources: FakeCounter | Unreadable, others: Callable[[float], bool] = lambda _: False) -> None:
        self.clock = ManualClock(START_S)
        self.meter = Meter(
            sources, clock=self.clock, allow_simulated=True, others_worked=lambda: others(self.clock.now_s - START_S)
        )
        self.meter.poll_once()

    async def pause(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.05)):
            self.clock.now_s += 0.05
            self.meter.poll_once()

    async def settle(self, *, given_up: Callable[[], bool] = lambda: False) -> tuple[str, ...]:
        return await at_rest(self.meter, SETTINGS, begun_s=START_S, given_up=given_up, pause=self.pause)

    @property
    def took_s(self) -> float:
        return self.clock.now_s - START_S


def counter(joules: Callable[[float], float], label: Label = Label.SIMULATED) -> FakeCounter:
    """Counts joules since the start, by the seconds since then."""
    return FakeCounter(lambda now_s: joules(now_s - START_S), label=label)


async def test_steady_power_is_rest() -> None:
    """Five seconds of steady power are enough."""
    bench = Bench(counter(lambda s: 100 * s))
    assert await bench.settle() == ()
    assert 5.5 <= bench.took_s < 7


async def test_falling_power_is_waited_for() -> None:
    """After work the power falls: nothing is handed over before it has stopped falling."""
    bench = Bench(counter(lambda s: 100 * s + 400 * (1 - math.exp(-s / 2))))
    assert await bench.settle() == ()
    assert 9 <= bench.took_s < 20


async def test_power_that_stays_unsteady_is_told() -> None:
    """When the time is up the LLM is handed over, with a flag."""
    bench = Bench(counter(lambda s: 100 * s + 30 * math.sin(2 * s)))
    assert await bench.settle() == ("not_steady",)
    assert 20 <= bench.took_s < 21


async def test_a_counter_that_fails_is_not_steady() -> None:
    """A hole in what is known of the power is no steadiness."""
    bench = Bench(counter(lambda s: 100 * s), Unreadable("gpu:x", "a test", in_boundary=True))
    assert await bench.settle() == ("not_steady",)


@pytest.mark.parametrize("sources", [(), (counter(lambda s: 10 * s, Label.MODELED),)])
async def test_without_a_counter_steadiness_is_not_known(sources: tuple[FakeCounter, ...]) -> None:
    """An estimate is no counter. The others on the machine are waited for all the same."""
    bench = Bench(*sources, others=lambda s: s < 4)
    assert await bench.settle() == ("steadiness_unknown",)
    assert 8.9 <= bench.took_s < 20


async def test_work_of_others_is_waited_for_and_told() -> None:
    """Whoever still works on the machine when the time is up makes the lease a contended one."""
    steady = counter(lambda s: 100 * s)
    bench = Bench(steady, others=lambda s: s < 8)
    assert await bench.settle() == ()
    assert bench.took_s > 12.9
    assert await Bench(counter(lambda s: 100 * s), others=lambda _: True).settle() == ("contended",)
    assert await Bench(others=lambda _: True).settle() == ("contended", "steadiness_unknown")


async def test_nobody_waits_for_a_dead_llm() -> None:
    """Its death is told in another way; it is not handed over as steady."""
    bench = Bench(counter(lambda s: 100 * s))
    assert await bench.settle(given_up=lambda: True) == ("not_steady",)
    assert bench.took_s == 0


async def test_a_warm_up_that_fails_or_hangs_is_told() -> None:
    """The LLM answers in time, or it is not warm; nothing is raised."""

    async def works() -> None:
        pass

    async def fails() -> None:
        raise RuntimeError("dead")

    async def hangs() -> None:
        await asyncio.Event().wait()

    assert await warmed_up(works, max_s=60)
    assert not await warmed_up(fails, max_s=60)
    assert not await warmed_up(hangs, max_s=0.01)
