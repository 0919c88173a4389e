"""Prompts at random on a machine whose true power is known: bounds contain the truth, and sums are exact."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.energy.figures import Energy
from deployments.energy.flights import Flight, Flights
from deployments.energy.meter import Meter
from deployments.energy.token_weights import UNKNOWN, Weight
from deployments.tokens import Tokens
from tests.support.fake_counters import FakeCounter, ManualClock, PowerCurve, Ticks

START_S = 1000.0
FIRST_S = START_S + 2.0
LAST_S = START_S + 16.0
POLL_S = 0.05
ROUNDING_J = 1e-4
"""A counter of 10 GJ is a float whose last digit is 2 µJ."""

prompts = st.lists(
    st.tuples(st.integers(0, 700), st.integers(5, 400), st.integers(0, 2000), st.integers(1, 300)),
    min_size=1,
    max_size=8,
)
"""When they begin and how long they take, in hundredths of a second; their computed and their output tokens."""


class LoadedGPU:
    """A GPU of 40 to 100 W when idle, and of a power of its own between any two changes of what is in flight.

    Its counter ticks every 20 to 120 ms, and stands still for a while if it is to. It may have run for years before.
    """

    def __init__(
        self, comings: Sequence[tuple[int, int, int, int]], seed: int, weight: float, known: Weight, stall_s: float
    ) -> None:
        chance = random.Random(seed)
        self.flying = [Flight(FIRST_S + begin / 100) for begin, *_ in comings]
        self.ends_s = [FIRST_S + (begin + length) / 100 for begin, length, *_ in comings]
        self.tokens = [Tokens(computed, 0, output) for _, _, computed, output in comings]
        self.rates = [(weight * computed + output) / length for _, length, computed, output in comings]
        times_s = sorted({START_S, LAST_S, *self.ends_s, *(flight.start_s for flight in self.flying)})
        idle_w = chance.uniform(40, 100)
        powers = [chance.uniform(idle_w, 700) if self.in_flight(a) else idle_w for a, _ in pairwise(times_s)]
        self.spans = list(pairwise(times_s))
        self.curve = PowerCurve(START_S, [(b - a, watts) for (a, b), watts in zip(self.spans, powers, strict=True)])
        still_s = chance.uniform(FIRST_S, LAST_S - 2) if stall_s else LAST_S
        ticks_s, period_s = [START_S - 0.1], chance.uniform(0.03, 0.1)
        while ticks_s[-1] < LAST_S + 1:
            ticks_s.append(ticks_s[-1] + period_s * chance.uniform(0.7, 1.2))
        ticks_s = [tick_s for tick_s in ticks_s if not still_s < tick_s < min(still_s + stall_s, LAST_S - 0.5)]
        ticks, before_j = Ticks(self.curve.joules, ticks_s, 1e-3), chance.choice([0.0, 1e6, 1e10])
        counter = FakeCounter(
            lambda now_s: before_j + ticks(now_s), name="gpu:x", max_age_s=None, step=1e-3, limit_w=700.0
        )
        self.clock = ManualClock(START_S)
        self.meter = Meter([counter], clock=self.clock)
        self.flights = Flights()
        self.flights.weight = known
        self._run(chance)

    def in_flight(self, at_s: float) -> list[int]:
        """Which prompts are in flight from this moment on."""
        both = zip(self.flying, self.ends_s, strict=True)
        return [number for number, (flight, end_s) in enumerate(both) if flight.start_s <= at_s < end_s]

    def _run(self, chance: random.Random) -> None:
        changes = [(end_s, 0, number) for number, end_s in enumerate(self.ends_s)]
        changes += [(flight.start_s, 1, number) for number, flight in enumerate(self.flying)]
        changes.sort(reverse=True)
        while self.clock.now_s < LAST_S + 0.5:
            while changes and changes[-1][0] <= self.clock.now_s:
                at_s, begins, number = changes.pop()
                flight = self.flying[number]
                if begins:
                    self.flights.begin(flight)
                    self.meter.work_begins(at_s)
                else:
                    self.flights.end(flight, at_s)
                    self.flights.counted(flight, self.tokens[number])
                    self.meter.work_ends(at_s)
                self.meter.window(START_S + 1, at_s)  # a look at any time changes nothing
            self.meter.poll_once()
            self.clock.now_s += POLL_S + chance.expovariate(1 / 0.004)

    def energies(self) -> list[Energy]:
        found = []
        for flight in self.flying:
            parts, assumed = self.flights.parts(flight)
            assert not assumed
            if flight.alone:
                energy = self.meter.window(flight.start_s, flight.end_s or 0.0, estimate_short=True, final=True)
            else:
                energy = self.meter.share(parts, final=True)
            found.append(energy)
        return found

    def true_j(self, number: int) -> float:
        """What flowed for a prompt: in every moment its part by the true weight."""
        return sum(
            self.flowed_j(a, b) * self.rates[number] / sum(self.rates[one] for one in together)
            for a, b in self.spans
            if number in (together := self.in_flight(a))
        )

    def flowed_j(self, start_s: float, end_s: float) -> float:
        return self.curve.joules(end_s) - self.curve.joules(start_s)

    def idle(self) -> list[tuple[float, float]]:
        return [(max(a, START_S + 1), b) for a, b in self.spans if not self.in_flight(a)]


def contains(energy: Energy, joules: float) -> bool:
    assert energy.low_j is not None
    assert energy.high_j is not None
    return energy.low_j - ROUNDING_J <= joules <= energy.high_j + ROUNDING_J


weights = st.sampled_from(
    [(0.02, Weight(0.01, 0.02, 0.04)), (0.3, Weight(0.2, 0.25, 0.3)), (0.0, UNKNOWN), (1.0, UNKNOWN)]
)
"""A true weight, and what is known of it."""


@settings(deadline=None, max_examples=150)
@given(prompts, st.integers(0, 2**32 - 1), weights, st.sampled_from([0.0, 0.0, 1.0, 4.0]))
def test_bounds_and_sums(
    comings: list[tuple[int, int, int, int]], seed: int, weight: tuple[float, Weight], stall_s: float
) -> None:
    """Every prompt's bounds contain what truly flowed for it, and prompts and idle time are exactly the whole.

    Whatever the phases of the counter, its stalls, and what is known of the weight of a prompt token.
    """
    world = LoadedGPU(comings, seed, *weight, stall_s)
    energies = world.energies()
    for number, energy in enumerate(energies):
        if energy.total_j is not None:
            assert contains(energy, world.true_j(number))
            assert energy.systematic_j is not None
    idle = world.meter.energy(world.meter.flow(world.idle(), final=True), estimate_short=True)
    whole = world.meter.window(START_S + 1, LAST_S, final=True)
    assert contains(idle, sum(world.flowed_j(a, b) for a, b in world.idle()))
    assert contains(whole, world.flowed_j(START_S + 1, LAST_S))
    parts_j = [energy.total_j or 0.0 for energy in (*energies, idle)]
    assert sum(parts_j) == pytest.approx(whole.total_j, abs=ROUNDING_J)


def mean_of_equal_prompts(seed: int) -> tuple[float, float, float]:
    """The mean error of 100 equal prompts, what it may be by chance, and their mean systematic error, J.

    On a counter of any kind, looked at in any rhythm; prompts may follow each other too fast to know the idle power.
    """
    chance = random.Random(seed)
    period_s, jitter = chance.choice([0.02, 0.05, 0.07, 0.1]), chance.choice([0.0, 0.1, 0.3])
    poll_s, late_s = chance.choice([0.02, 0.05, 0.1]), chance.choice([0.002, 0.01])
    length_s, pause_s = chance.uniform(0.2, 1.0), chance.choice([0.05, 0.3, 1.0])
    idle_w = chance.choice([40.0, 100.0, 300.0])
    active_w = idle_w + chance.choice([20.0, 100.0, 350.0])
    changes_s = [START_S + chance.choice([0.1, 3.0])]
    for _ in range(100):
        begin_s = changes_s[-1]
        changes_s += [begin_s + length_s, begin_s + length_s + pause_s * chance.uniform(0.5, 1.5)]
    powers = [idle_w, *[active_w, idle_w] * 100]
    times_s = pairwise([START_S, *changes_s])
    curve = PowerCurve(START_S, [(b - a, watts) for (a, b), watts in zip(times_s, powers, strict=True)])
    ticks_s = [START_S - period_s]
    while ticks_s[-1] < changes_s[-1] + 2:
        ticks_s.append(ticks_s[-1] + period_s * chance.uniform(1 - jitter, 1 + jitter))
    clock = ManualClock(START_S)
    counter = FakeCounter(Ticks(curve.joules, ticks_s, 1e-3), name="gpu:x", max_age_s=None, step=1e-3)
    meter = Meter([counter], clock=clock, poll_s=poll_s)
    noted = 0
    while clock.now_s < changes_s[-1] + 1:
        while noted < 200 and changes_s[noted] <= clock.now_s:
            (meter.work_ends if noted % 2 else meter.work_begins)(changes_s[noted])
            noted += 1
        meter.poll_once()
        clock.now_s += poll_s + chance.expovariate(1 / late_s)
    found = [meter.window(*changes_s[index : index + 2], estimate_short=True) for index in range(6, 200, 2)]
    joules = [energy.total_j for energy in found if energy.total_j is not None]
    systematic_j = [energy.systematic_j for energy in found if energy.systematic_j is not None]
    assert len(joules) == len(found)
    return fmean(joules) - active_w * length_s, stdev(joules) / len(joules) ** 0.5, fmean(systematic_j)


def test_systematic_error_covers_the_bias() -> None:
    """The mean of equal prompts is wrong by no more than their systematic error, beyond three standard errors."""
    for seed in range(60):
        error_j, chance_j, systematic_j = mean_of_equal_prompts(seed)
        assert abs(error_j) <= systematic_j + 3 * chance_j
