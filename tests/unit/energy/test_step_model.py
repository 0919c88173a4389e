"""What a counter that ticks tells of prompts: by their known begins and ends, whatever the phase of its ticks."""

from __future__ import annotations

import random
from statistics import fmean, stdev

import pytest

from deployments.energy.counters.activity import Activity
from deployments.energy.counters.history import Track
from deployments.energy.counters.probe import CPUModelSource, Source
from deployments.energy.figures import CPUModel, Energy
from deployments.energy.meter import Meter
from registry.wire.flags import Flag
from registry.wire.labels import Label
from tests.support.fake_counters import FakeCounter, ManualClock, PowerCurve, Ticks

START_S = 1000.0
TICK_S = 0.1
POLL_S = 0.05
IDLE_W, ACTIVE_W = 50.0, 400.0


# --- by hand ---------------------------------------------------------------------------------------------------


def ticked(*units: float, activity: Activity) -> Track:
    """A counter that is read exactly at each of its ticks, every 100 ms from 0 s on."""
    track = Track(max_age_s=0.0, step=0.0, max_rate=None, history_s=60.0, stale_s=0.5, activity=activity)
    for index, value in enumerate(units):
        track.add(index / 10, index / 10, value)
    return track


def test_levels_by_hand() -> None:
    """Idle at 50 W, at work at 400 W from 0.64 to 0.72 s; ticks every 0.1 s.

    The tick of 0.6 to 0.7 s holds 0.04 s idle (2 J) and 0.06 s at work (24 J), that of 0.7 to 0.8 s holds 8 J and 4 J.
    So E(0.64) = 30 + 2 = 32 J and E(0.72) = 56 + 8 = 64 J: 32 J in 0.08 s are 400 W. A straight line would say
    30 + 0.4 · 26 = 40.4 J and 56 + 0.2 · 12 = 58.4 J: 18 J.
    """
    activity = Activity()
    activity.begin(0.64)
    activity.end(0.72)
    begin, end = ticked(0, 5, 10, 15, 20, 25, 30, 56, 68, 73, activity=activity).levels([0.64, 0.72])
    assert (begin.mid, end.mid) == pytest.approx((32.0, 64.0))
    assert (begin.low, begin.high, end.low, end.high) == (30.0, 56.0, 56.0, 68.0)
    assert (begin.systematic, end.systematic) == pytest.approx((0.0, 0.0))


def test_idle_power_that_is_not_known() -> None:
    """Work from the first moment on: a straight line, whose error is a sixth of a tick of all the power.

    400 W from 0 to 0.25 s, then 50 W. E(0.25) = 80 + 0.5 · 22.5 = 91.25 J for a true 100 J. The idle power may be 0:
    from 0.1 to 0.4 s there are 67.5 J in 0.15 s at work, 450 W, and 450 W · 0.1 s / 6 = 7.5 J.
    """
    activity = Activity()
    activity.begin(0.0)
    activity.end(0.25)
    [level] = ticked(0, 40, 80, 102.5, 107.5, 112.5, activity=activity).levels([0.25])
    assert level.mid == pytest.approx(91.25)
    assert level.systematic == pytest.approx(7.5)


def test_straight_line_between_two_prompts() -> None:
    """Where nothing is idle within a tick it is divided by time; the error is a sixth of a tick of the change.

    200 W until 0.25 s, 400 W from then on: E(0.25) = 40 + 0.5 · 30 = 55 J for a true 50 J, ± (400 - 200) · 0.1 / 6.
    """
    activity = Activity()
    activity.begin(0.0)
    [level] = ticked(0, 20, 40, 70, 110, activity=activity).levels([0.25])
    assert level.mid == pytest.approx(55.0)
    assert level.systematic == pytest.approx(200 * 0.1 / 6)


def test_idle_power_of_the_nearest_stretch() -> None:
    """The idle power before a prompt is that of the last idle stretch of half a second or more, not an older one."""
    activity = Activity()
    power = [50.0] * 10 + [400.0] * 5 + [90.0] * 10 + [400.0] * 5 + [90.0]
    for begin_s, end_s in ((1.0, 1.5), (2.55, 3.0)):
        activity.begin(begin_s)
        activity.end(end_s)
    units = [sum(power[:index]) / 10 for index in range(len(power) + 1)]
    [level] = ticked(*units, activity=activity).levels([2.55])
    assert level.mid == pytest.approx(units[25] + 90 * 0.05)


def test_power_after_the_work_is_not_that_before_it() -> None:
    """Clocks stay up after a prompt: 50 W before, 400 W from 1.05 to 1.25 s, 150 W from then on; 80 J.

    The tick of 1.0 to 1.1 s holds 2.5 J and 20 J, that of 1.2 to 1.3 s 20 J and 7.5 J. With the 50 W of before, the end
    would get 27.5 - 2.5 = 25 J: the prompt 85 J, and so would every other one. The ticks after it tell 150 W.
    """
    power = [50.0] * 10 + [225.0, 400.0, 275.0] + [150.0] * 7
    activity = Activity()
    activity.begin(1.05)
    activity.end(1.25)
    units = [sum(power[:index]) / 10 for index in range(len(power) + 1)]
    begin, end = ticked(*units, activity=activity).levels([1.05, 1.25])
    assert end.mid - begin.mid == pytest.approx(80.0)
    assert begin.systematic + end.systematic == pytest.approx(0.0, abs=1e-9)


def test_power_that_falls_after_the_work_is_in_the_systematic_error() -> None:
    """400 W from 1.05 to 1.25 s, then 250 W until 1.4 s, then 50 W: 80 J, and the tail is told by whole ticks.

    The tick of 1.2 to 1.3 s holds 20 J and 12.5 J; the next one is 250 W, the one after it 50 W. The power may have
    been 200 W off for the 0.05 s after the end: 10 J.
    """
    power = [50.0] * 10 + [225.0, 400.0, 325.0, 250.0] + [50.0] * 6
    activity = Activity()
    activity.begin(1.05)
    activity.end(1.25)
    units = [sum(power[:index]) / 10 for index in range(len(power) + 1)]
    begin, end = ticked(*units, activity=activity).levels([1.05, 1.25])
    assert end.mid - begin.mid == pytest.approx(80.0)
    assert end.systematic == pytest.approx(10.0)


def test_gap_without_a_tick_of_its_own_may_take_any_power() -> None:
    """A gap of 0.05 s between two prompts, inside one tick: its power is between that at rest and that at work.

    400 W from 1.0 to 1.22 s and from 1.27 to 1.5 s; the hardware stays at 400 W between. 50 W · 0.05 s are taken for
    the gap of a true 20 J, so the first prompt ends at 37.5 · 0.02/0.05 = 15 J of its 40 J tick for a true 8 J.
    By the three ticks around, work takes (120 - 2.5) J / 0.25 s = 470 W: the error is 420 W · 0.05 s · 0.4 = 8.4 J.
    """
    power = [50.0] * 10 + [400.0] * 5 + [50.0] * 6
    activity = Activity()
    for begin_s, end_s in ((1.0, 1.22), (1.27, 1.5)):
        activity.begin(begin_s)
        activity.end(end_s)
    units = [sum(power[:index]) / 10 for index in range(len(power) + 1)]
    [level] = ticked(*units, activity=activity).levels([1.22])
    assert level.mid - units[12] == pytest.approx(15.0)
    assert level.systematic == pytest.approx(8.4)


def test_level_after_work_waits_for_the_power_after_it() -> None:
    """A prompt ends at 1.22 s, in a tick that ends at 1.25 s: that is final when the counter is read after 1.75 s.

    A counter that breaks off is final at once: no more will be known of it.
    """
    for broken in (False, True):
        activity = Activity()
        activity.begin(1.05)
        activity.end(1.22)
        track = Track(max_age_s=None, step=0.0, max_rate=None, history_s=60.0, stale_s=0.5, activity=activity)
        final = []
        for index in range(21):
            track.add(index / 10, index / 10, 5.0 * index)
            if broken and index == 14:
                track.lost(Flag.COUNTER_RESET)
            final.append(track.is_final(1.22))
        assert final.index(True) == (14 if broken else 18)


def test_idle_power_never_exceeds_what_flowed() -> None:
    """A tick with less than the idle power for its idle time gives all of it to that time, and no level goes back."""
    activity = Activity()
    activity.begin(0.95)
    activity.end(1.5)
    units = [5.0 * index for index in range(10)] + [46.0, 80.0, 120.0]
    levels = ticked(*units, activity=activity).levels([0.9, 0.93, 0.95, 0.97, 1.0])
    mids = [level.mid for level in levels]
    assert mids == sorted(mids)
    assert mids[2] == pytest.approx(46.0)


def test_a_level_is_the_same_for_ever() -> None:
    """A level that is final stays what it is, whatever work comes later and however often it is asked for."""
    activity = Activity()
    track = Track(max_age_s=None, step=1e-3, max_rate=None, history_s=60.0, stale_s=0.5, activity=activity)
    curve = PowerCurve(0.0, [(0.75, 50.0), (0.22, 400.0), (0.31, 50.0), (0.4, 300.0), (9.0, 60.0)])
    changes = [(0.75, True), (0.97, False), (1.28, True), (1.68, False)]
    seen: dict[float, float] = {}
    for poll in range(80):
        at_s = poll * 0.03
        while changes and changes[0][0] <= at_s:
            time_s, begins = changes.pop(0)
            (activity.begin if begins else activity.end)(time_s)
        track.add(at_s, at_s, curve.joules(at_s // 0.08 * 0.08))
        for time_s in (0.75, 0.97, 1.28, 1.68) if track.is_final(0.2) else ():
            if time_s > at_s:
                continue
            [level] = track.levels([time_s])
            if not level.provisional:
                assert level.mid == seen.setdefault(time_s, level.mid)
                track._runs[-1]._final.clear()  # so that it is computed again
    assert len(seen) == 4


# --- many prompts ----------------------------------------------------------------------------------------------


class Bench:
    """A GPU's counter of 100 ms, looked at every 50 ms, and equal prompts at random phases of it."""

    def __init__(
        self,
        length_s: float,
        *,
        prompts: int = 200,
        seed: int = 1,
        told: bool = True,
        tick_s: float = TICK_S,
        max_age_s: float | None = None,
    ) -> None:
        chance = random.Random(seed)
        steps, self.prompts, at_s = [(3.0, IDLE_W)], [], START_S + 3.0
        for _ in range(prompts):
            pause_s = chance.uniform(0.6, 1.6)
            steps += [(length_s, ACTIVE_W), (pause_s, IDLE_W)]
            self.prompts.append((at_s, at_s + length_s))
            at_s += length_s + pause_s
        curve = PowerCurve(START_S, steps)
        ticks_s = [START_S - tick_s + tick_s * tick for tick in range(int((at_s - START_S) / tick_s) + 200)]
        source = FakeCounter(Ticks(curve.joules, ticks_s, 1e-3), name="gpu:x", max_age_s=max_age_s, step=1e-3)
        clock = ManualClock(START_S + 0.01)
        self.meter = Meter([source], clock=clock)
        changes = [time_s for prompt in self.prompts for time_s in prompt] if told else []
        changes.reverse()
        while clock.now_s < at_s + 1.0:
            while changes and changes[-1] <= clock.now_s:
                (self.meter.work_ends if len(changes) % 2 else self.meter.work_begins)(changes.pop())
            self.meter.poll_once()
            clock.now_s += POLL_S + chance.expovariate(1 / 0.002)

    def energies(self) -> list[Energy]:
        return [self.meter.window(*prompt, estimate_short=True) for prompt in self.prompts]


def known(value: float | None) -> float:
    assert value is not None
    return value


def test_mean_of_equal_prompts() -> None:
    """200 prompts of 200 ms at 400 W on 50 W idle are 80 J each, and their mean says so.

    By a straight line they are 68.3 ± 0.5 J: (400 - 50) W · 0.1 s / 3 = 11.7 J are missing in each. With their known
    begins and ends the mean is within the systematic error that it tells, and that is a small part of those 11.7 J.
    """
    blind = fmean(known(energy.total_j) for energy in Bench(0.2, told=False).energies())
    assert blind == pytest.approx(80 - 350 * TICK_S / 3, abs=1.5)
    energies = Bench(0.2).energies()
    joules = [known(energy.total_j) for energy in energies]
    systematic_j = fmean(known(energy.systematic_j) for energy in energies)
    chance_j = 2 * stdev(joules) / len(joules) ** 0.5
    assert abs(fmean(joules) - 80) <= systematic_j + chance_j
    assert systematic_j < 350 * TICK_S / 9
    assert all(known(energy.low_j) <= 80 <= known(energy.high_j) for energy in energies)


@pytest.mark.parametrize(("length_s", "max_age_s"), [(0.2, None), (0.6, 0.3), (1.4, 1.2)])
def test_mean_with_a_counter_that_is_faster_than_the_poller(length_s: float, max_age_s: float | None) -> None:
    """A counter of 10 ms, read every 50 ms, is always fresher than it is taken for: the same error in each prompt.

    A reading is taken to be 25 ms old, or half of what it can be, 0.15 s or 0.6 s. It is 5 ms old, so work seems to
    begin 20 ms, 145 ms or 595 ms too early, and that much of 350 W, 7, 51 or 208 J, is missing in each: no chance.
    """
    energies = Bench(length_s, tick_s=0.01, max_age_s=max_age_s).energies()
    joules = [known(energy.total_j) for energy in energies]
    systematic_j = fmean(known(energy.systematic_j) for energy in energies)
    chance_j = 2 * stdev(joules) / len(joules) ** 0.5
    assert abs(fmean(joules) - ACTIVE_W * length_s) <= systematic_j + chance_j


def test_no_selection_by_phase() -> None:
    """Equal prompts are all measured or all too short: by their length, not by luck of the counter's phase.

    By what the counter proves, 0.2 s and 0.25 s of 100 ms ticks would be measured for some phases only.
    """
    for length_s, label in ((0.2, Label.MODELED), (0.25, Label.MODELED), (0.3, Label.MEASURED), (0.5, Label.MEASURED)):
        energies = Bench(length_s, prompts=100).energies()
        assert {energy.label for energy in energies} == {label}
        assert {"too_short" in energy.flags for energy in energies} == {label is Label.MODELED}
        if label is Label.MEASURED:
            assert all(known(energy.low_j) > 0 for energy in energies)


def test_shortest_prompt_is_told() -> None:
    """Each source tells the shortest prompt that it can measure: two ticks and one to two polls, 250 to 300 ms here."""
    bench = Bench(0.5, prompts=20)
    sources = bench.meter.describe()["sources"]
    [source] = sources if isinstance(sources, list) else []
    assert 2 * TICK_S + POLL_S <= source["citable_s"] <= 2 * (TICK_S + POLL_S)


def test_shortest_prompt_of_a_model_at_rest() -> None:
    """A counter that is known to be fresh tells as much while it stands still: two readings and its age are enough."""
    track = Track(max_age_s=0.01, step=0.01, max_rate=4.0, history_s=60.0, stale_s=0.5)
    for reading in range(400):
        track.add(reading / 20, reading / 20, 0.01 * (reading // 40))
    assert track.citable_s == pytest.approx(0.11, abs=0.006)


# --- with a part that has a model -----------------------------------------------------------------------------


def test_bounds_of_measured_and_modelled() -> None:
    """A GPU by a counter of 100 ms and a CPU by a model: the bounds of the sum contain the truth in every phase.

    In 0.3 s the GPU takes 450 W · 0.3 s = 135 J; four CPUs of 1 W each when idle, one of them half of the time at
    work with 4 W more, take 1.2 + 0.6 = 1.8 J: 136.8 J. Where the GPU counted as exact, 139.8 J (139.3 to 141.3) were
    told of such a prompt for a true 150.9 J.
    """

    class CPUTime:
        def read_s(self, now_s: float) -> float:
            return (now_s - START_S) / 2

    clock, chance = ManualClock(START_S), random.Random(3)
    prompts = [(START_S + 2 + second, START_S + 2.3 + second + chance.random() / 2) for second in range(30)]
    prompts = [(end_s - 0.3, end_s) for _, end_s in prompts]
    steps, at_s = [], START_S
    for begin_s, end_s in prompts:
        steps += [(begin_s - at_s, 50.0), (end_s - begin_s, 450.0)]
        at_s = end_s
    curve = PowerCurve(START_S, [*steps, (9.0, 50.0)])
    ticks_s = [START_S - 0.05 + TICK_S * tick for tick in range(400)]
    gpu = FakeCounter(Ticks(curve.joules, ticks_s, 1e-3), name="gpu:x", max_age_s=None, step=1e-3)
    cpu: Source = CPUModelSource(CPUModel(1.0, 5.0, 0.8, 1.5, 4.0, 7.5, "a test"), CPUTime(), cpus=4)  # type: ignore[arg-type]
    meter = Meter([gpu, cpu], clock=clock)
    while clock.now_s < START_S + 34:
        meter.poll_once()
        clock.now_s += POLL_S
    true_j = 136.8
    for prompt in prompts:
        energy = meter.window(*prompt, estimate_short=True)
        assert energy.label is Label.MODELED
        assert known(energy.low_j) <= true_j <= known(energy.high_j)
