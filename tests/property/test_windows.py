from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deployments.energy.counters.history import NoWindow, Track, between
from deployments.energy.counters.probe import CPUModelSource, PowercapZone
from deployments.energy.figures import Component, CPUModel, total
from deployments.energy.flights import Flight, Flights
from deployments.energy.meter import Meter
from deployments.tokens import Tokens
from registry.wire.labels import Label, worst
from tests.support.fake_counters import FakeCounter, ManualClock, PowerCurve, Ticks, set_energy, write_zone

START_S = 1000.0
SECONDS = 12.0
LIMIT_W = 700.0

powers = st.lists(st.tuples(st.floats(0.02, 3.0), st.floats(20.0, LIMIT_W)), min_size=1, max_size=12)
seeds = st.integers(0, 2**32 - 1)


class Bench:
    """A synthetic machine that has run for a while: its true energy is known, its counter shows it as NVML does."""

    def __init__(
        self,
        steps: Sequence[tuple[float, float]],
        seed: int,
        *,
        limit_w: float | None = LIMIT_W,
        max_age_s: float | None = None,
        seconds: float = SECONDS,
    ) -> None:
        """Ticks 20 to 100 ms apart (within ``max_age_s`` where it is known), looked at about every 50 ms."""
        self.curve = PowerCurve(START_S, steps)
        self.random = random.Random(seed)
        longest_s = 0.1 if max_age_s is None else max_age_s
        ticks_s = [START_S]
        while ticks_s[-1] < START_S + seconds:
            ticks_s.append(ticks_s[-1] + self.random.uniform(longest_s / 5, longest_s))
        self.clock = ManualClock(START_S)
        counter = FakeCounter(
            Ticks(self.curve.joules, ticks_s, 1e-3),
            name="gpu:x",
            limit_w=limit_w,
            max_age_s=max_age_s,
            step=1e-3,
        )
        self.meter = Meter([counter], clock=self.clock)
        while self.clock.now_s < START_S + seconds:
            self.meter.poll_once()
            self.clock.now_s += 0.05 + self.random.expovariate(1 / 0.005)

    def true_j(self, start_s: float, end_s: float) -> float:
        return self.curve.joules(end_s) - self.curve.joules(start_s)

    def interval(self, end_s: float = SECONDS - 0.5) -> tuple[float, float]:
        """A random window inside the history that is settled."""
        first, second = sorted(START_S + self.random.uniform(0.5, end_s) for _ in range(2))
        return first, max(second, first + 1e-6)


@settings(deadline=None)
@given(powers, seeds, st.sampled_from([None, 0.002]))
def test_error_is_within_the_resolution(steps: list[tuple[float, float]], seed: int, max_age_s: float | None) -> None:
    """A window's error is never more than the resolution that is told with it, whatever the power does."""
    bench = Bench(steps, seed, max_age_s=max_age_s, seconds=6.0)
    for _ in range(50):
        start_s, end_s = bench.interval(5.5)
        energy = bench.meter.window(start_s, end_s)
        if energy.total_j is not None:
            assert energy.resolution_j is not None
            assert abs(energy.total_j - bench.true_j(start_s, end_s)) <= energy.resolution_j + 1e-9
            assert "provisional" not in energy.flags


def test_error_over_ten_thousand_windows() -> None:
    """Of random windows 99.9 % and more are within their resolution, of those of 2 s and more half within 5 %."""
    within = known = 0
    relative: list[float] = []
    for seed in range(20):
        chance = random.Random(seed)
        steps = [(chance.uniform(0.02, 3.0), chance.uniform(60, LIMIT_W)) for _ in range(12)]
        bench = Bench(steps, seed)
        for _ in range(500):
            start_s, end_s = bench.interval()
            energy = bench.meter.window(start_s, end_s)
            if energy.total_j is None or energy.resolution_j is None:
                continue
            known += 1
            error_j = abs(energy.total_j - bench.true_j(start_s, end_s))
            within += error_j <= energy.resolution_j + 1e-9
            if end_s - start_s >= 2:
                relative.append(error_j / bench.true_j(start_s, end_s))
    assert known > 9000
    assert within / known >= 0.999
    assert sorted(relative)[len(relative) // 2] < 0.05
    assert max(relative) < 0.10


@settings(deadline=None)
@given(powers, seeds)
def test_provisional_error_is_within_the_resolution(steps: list[tuple[float, float]], seed: int) -> None:
    """A window that ends right now is told as provisional, and its error is within its (larger) resolution, too."""
    bench = Bench(steps, seed, seconds=4.0)
    end_s = bench.clock.now_s
    for start_s in (START_S + 0.5, START_S + 1.5, end_s - 0.6, end_s - 0.3):
        energy = bench.meter.window(start_s, end_s)
        if energy.total_j is not None:
            assert "provisional" in energy.flags
            assert not bench.meter.is_final(end_s)
            assert energy.resolution_j is not None
            assert abs(energy.total_j - bench.true_j(start_s, end_s)) <= energy.resolution_j + 1e-9


@settings(deadline=None)
@given(powers, seeds)
def test_windows_are_additive(steps: list[tuple[float, float]], seed: int) -> None:
    """Windows that follow each other sum up to the window over both."""
    bench = Bench(steps, seed, seconds=6.0)
    times = sorted(START_S + bench.random.uniform(0.5, 5.5) for _ in range(4))
    assume(all(a < b for a, b in itertools.pairwise(times)))
    parts = [bench.meter.window(a, b).total_j for a, b in itertools.pairwise(times)]
    whole = bench.meter.window(times[0], times[-1]).total_j
    assume(whole is not None and all(part is not None for part in parts))
    assert sum(part or 0 for part in parts) == pytest.approx(whole)


@settings(deadline=None)
@given(powers, seeds)
def test_never_zero_never_negative(steps: list[tuple[float, float]], seed: int) -> None:
    """A window, however short, is more than 0 J or unavailable; never 0, never negative."""
    bench = Bench(steps, seed, seconds=3.0)
    for _ in range(50):
        start_s, end_s = bench.interval(2.5)
        for length_s in (end_s - start_s, 0.001, 0.05, 0.15):
            energy = bench.meter.window(start_s, start_s + length_s)
            assert energy.total_j is None or energy.total_j > 0
            assert (energy.total_j is None) == (energy.label is Label.UNAVAILABLE)


@settings(deadline=None)
@given(powers, seeds, st.floats(0.7, 3.5))
def test_reset_is_never_bridged(steps: list[tuple[float, float]], seed: int, reset_after_s: float) -> None:
    """A window over a reset of the counter is unavailable; those before and after it hold as ever."""
    bench = Bench(steps, seed, seconds=0.0)
    reset_s = START_S + reset_after_s
    counter = Ticks(bench.curve.joules, [START_S + 0.03 * tick for tick in range(200)], 1e-3)
    at_reset_j = counter(reset_s)
    source = FakeCounter(
        # High enough before that what flows between two polls can't make up for the fall: that no one could see.
        lambda now_s: counter(now_s) + (1e4 if now_s < reset_s else -at_reset_j),
        name="gpu:x",
        max_age_s=None,
        step=1e-3,
        limit_w=LIMIT_W,
    )
    meter = Meter([source], clock=bench.clock)
    while bench.clock.now_s < START_S + 5:
        meter.poll_once()
        bench.clock.now_s += 0.05
    for _ in range(30):
        start_s, end_s = bench.interval(4.5)
        energy = meter.window(start_s, end_s)
        if start_s < reset_s <= end_s:
            assert energy.total_j is None
            assert energy.flags
        elif energy.total_j is not None:
            assert energy.resolution_j is not None
            assert abs(energy.total_j - bench.true_j(start_s, end_s)) <= energy.resolution_j + 1e-9


@settings(deadline=None, max_examples=50)
@given(
    steps_uj=st.lists(st.integers(0, 49_000_000), min_size=1, max_size=30),
    first_uj=st.integers(0, 99_999_999),
    range_uj=st.integers(100_000_000, 262_143_328_850),
)
def test_wraps_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, steps_uj: list[int], first_uj: int, range_uj: int
) -> None:
    """However often a powercap zone wraps, the joules it counted are the joules that flowed."""
    zone = write_zone(
        tmp_path_factory.mktemp("powercap"), "intel-rapl:0", "package-0", energy_uj=first_uj, range_uj=range_uj
    )
    source = PowercapZone("package-0", zone)
    source.read(0.0)
    flowed_uj, last_j = 0, 0.0
    for index, step_uj in enumerate(steps_uj, 1):
        flowed_uj += step_uj
        set_energy(zone, (first_uj + flowed_uj) % range_uj)
        joules = source.read(index * 0.05)
        assert joules >= last_j
        last_j = joules
    assert last_j == pytest.approx(flowed_uj / 1e6)


@settings(deadline=None, max_examples=30)
@given(powers, seeds)
def test_thinned_history_still_holds(steps: list[tuple[float, float]], seed: int) -> None:
    """Windows in the distant past, of which few edges are kept, are wider in resolution but never wrong."""
    curve = PowerCurve(0.0, [*steps * 40, (1.0, 100.0)])
    chance = random.Random(seed)
    track = Track(max_age_s=None, step=1e-3, max_rate=None, history_s=3000.0, stale_s=0.5)
    counter = Ticks(curve.joules, [0.06 * tick for tick in range(40_000)], 1e-3)
    time_s = 0.0
    while time_s < 1500:
        track.add(time_s, time_s, counter(time_s))
        time_s += 0.25
    for _ in range(30):
        start_s, end_s = sorted((chance.uniform(1, 1499), chance.uniform(1, 1499)))
        flow = between(*track.levels((start_s, end_s)))
        assert flow.low - 1e-6 <= curve.joules(end_s) - curve.joules(start_s) <= flow.high + 1e-6
        assert flow.low <= flow.mid <= flow.high


def test_history_is_bounded() -> None:
    """A year's polling keeps no more than the history; what is older is refused, what is inside is exact enough."""
    track = Track(max_age_s=0.0, step=0.0, max_rate=None, history_s=3600.0, stale_s=0.5)
    for poll in range(60_000):
        track.add(poll * 0.2, poll * 0.2, float(poll))
    [run] = track._runs
    assert len(run.units) < 2 * (600 / 0.2 + 3600)
    old = [seen_s for seen_s in run.seen_s if seen_s < run.seen_s[-1] - 2000]
    assert len(old) > 1000
    assert min(later - earlier for earlier, later in itertools.pairwise(old)) >= 0.99
    with pytest.raises(NoWindow, match="out_of_history"):
        track.levels((5000.0, 11_000.0))
    flow = between(*track.levels((10_000.3, 11_000.3)))
    assert flow.mid == pytest.approx(5000, abs=1)


@pytest.fixture
def track() -> Track:
    """Edges of 10, 20 and 30 units, the last of them between 1.05 and 1.10 s."""
    track = Track(max_age_s=None, step=0.5, max_rate=100.0, history_s=60.0, stale_s=0.5)
    for index, units in enumerate([0, 0, 10, 10, 20, 20, 30]):
        track.add(0.80 + 0.05 * index, 0.80 + 0.05 * index, units)
    return track


def test_bounds_of_a_level(track: Track) -> None:
    """A level is at least the last edge seen, and less than a step above the first edge that came after it."""
    [level] = track.levels([0.93])
    assert (level.low, level.high, level.provisional) == (10, 20.5, False)
    assert level.mid == pytest.approx(10 + 10 * (0.93 - 0.875) / 0.1)


def test_bounds_after_the_last_edge(track: Track) -> None:
    """After the last edge a level is at most what can have flowed since that edge's earliest moment."""
    [level] = track.levels([1.20])
    assert level.low == 30
    assert level.high == pytest.approx(30 + 0.5 + 100 * (1.20 - 1.05))
    assert level.mid == pytest.approx(30 + 100 * (1.20 - 1.075))
    assert level.provisional


# --- sums ------------------------------------------------------------------------------------------------------


components = st.builds(
    lambda label, joules, spread: (
        Component("x", "a test", label)
        if label is Label.UNAVAILABLE
        else Component(
            "x",
            "a test",
            label,
            joules=joules,
            low_j=joules * (1 - spread),
            high_j=joules * (1 + spread),
            resolution_j=joules / 100,
            systematic_j=joules / 200,
            counter_label=label,
        )
    ),
    st.sampled_from([label for label in Label if label is not Label.SOURCED]),
    st.floats(0.001, 1e6),
    st.floats(0, 1),
)


@given(st.lists(components, max_size=6))
def test_labels_never_improve_by_summing(parts: list[Component]) -> None:
    """A sum's label is no better than that of any of its parts, and a sum with a hole is no sum."""
    energy = total(parts)
    order = list(Label)
    assert all(order.index(energy.label) >= order.index(part.label) for part in parts)
    assert (energy.total_j is None) == (not parts or any(part.joules is None for part in parts))
    if energy.total_j is not None:
        assert energy.total_j == pytest.approx(sum(part.joules or 0 for part in parts))
        assert energy.low_j is not None
        assert energy.high_j is not None
        assert energy.low_j <= energy.total_j * (1 + 1e-9)
        assert energy.total_j <= energy.high_j * (1 + 1e-9)


@given(st.lists(st.sampled_from(Label), min_size=1))
def test_worst_label_is_one_of_them(labels: list[Label]) -> None:
    """The worst of some labels is one of them, whatever their order."""
    assert worst(labels) in labels
    assert worst(labels) is worst(reversed(labels))


# --- attribution -----------------------------------------------------------------------------------------------


comings = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40), st.integers(0, 3000)), max_size=8)
"""When prompts begin, and how long they take, in tenths of a second; their tokens."""


def fly(comings: Sequence[tuple[int, int, int]]) -> tuple[Flights, list[Flight]]:
    """What came and went, with all tokens known."""
    flights, flying = Flights(), [Flight(START_S + 0.6 + start / 10) for start, _, _ in comings]
    changes = [(start / 10, 1, index) for index, (start, _, _) in enumerate(comings)]
    changes += [((start + length) / 10, 0, index) for index, (start, length, _) in enumerate(comings)]
    for at_s, begins, index in sorted(changes):
        if begins:
            flights.begin(flying[index])
        else:
            flights.end(flying[index], START_S + 0.6 + at_s)
    for flight, (_, _, tokens) in zip(flying, comings, strict=True):
        flights.counted(flight, Tokens(0, 0, tokens))
    return flights, flying


def gaps_between(flying: Sequence[Flight], start_s: float, end_s: float) -> list[tuple[float, float]]:
    gaps, busy_until_s = [], start_s
    for flight in sorted(flying, key=lambda flight: flight.start_s):
        if flight.start_s > busy_until_s:
            gaps.append((busy_until_s, flight.start_s))
        busy_until_s = max(busy_until_s, flight.end_s or 0.0)
    return [*gaps, *([(busy_until_s, end_s)] if busy_until_s < end_s else [])]


@settings(deadline=None)
@given(powers, seeds, comings, st.booleans())
def test_shares_and_idle_are_the_total(
    steps: list[tuple[float, float]], seed: int, comings: list[tuple[int, int, int]], modelled: bool
) -> None:
    """Prompt shares plus idle are all that flowed; no share is 0, and shared ones are modelled with a range."""
    bench = modelled_bench(seed) if modelled else Bench(steps, seed)
    flights, flying = fly(comings)
    start_s, end_s = START_S + 0.6, START_S + 10.7
    whole = bench.meter.window(start_s, end_s)
    gaps = gaps_between(flying, start_s, end_s)
    energies = [bench.meter.energy(bench.meter.flow(gaps), estimate_short=True)] if gaps else []
    for flight in flying:
        parts, assumed = flights.parts(flight)
        assert not assumed
        if flight.alone:
            energies.append(bench.meter.window(flight.start_s, flight.end_s or 0.0, estimate_short=True))
        else:
            energies.append(bench.meter.share(parts))
            assert "shared" in energies[-1].flags or energies[-1].total_j is None
    assert whole.total_j is not None
    assert sum(energy.total_j or 0.0 for energy in energies) == pytest.approx(whole.total_j)
    order = list(Label)
    for energy in energies:
        assert energy.total_j is None or energy.total_j > 0
        assert order.index(energy.label) >= order.index(whole.label)
        if "shared" in energy.flags:
            assert energy.label is Label.MODELED
        if energy.label is Label.MODELED and energy.total_j is not None:
            assert energy.low_j is not None
            assert energy.high_j is not None
            assert energy.low_j - 1e-6 <= energy.total_j <= energy.high_j + 1e-6


def modelled_bench(seed: int) -> Bench:
    """A bench whose counter is the CPU model's, over CPU time that grows in steps."""
    bench = Bench([(1.0, 100.0)], seed, seconds=0.0)
    model = CPUModel(0.5, 4.0, 0.25, 1.0, 2.0, 8.0, "a test")

    class CPUTime:
        def read_s(self, now_s: float) -> float:
            return float(int((now_s - START_S) * 100) // 3) / 20

    bench.meter = Meter([CPUModelSource(model, CPUTime(), cpus=4)], clock=bench.clock)  # type: ignore[arg-type]
    while bench.clock.now_s < START_S + SECONDS:
        bench.meter.poll_once()
        bench.clock.now_s += 0.05
    return bench


@given(comings)
def test_seconds_are_given_away_once(comings: list[tuple[int, int, int]]) -> None:
    """The prompts' seconds of the machine and those without a prompt are all that went by; no part is 0 or negative."""
    flights, flying = fly(comings)
    reserved_s = 0.0
    for flight in flying:
        parts, _ = flights.parts(flight)
        assert all(0 < part <= 1 for part in parts.mid)
        assert all(
            0 <= low <= mid <= high <= 1 for low, mid, high in zip(parts.low, parts.mid, parts.high, strict=True)
        )
        reserved_s += parts.reserved_s
    start_s, end_s = START_S, START_S + 12
    assert reserved_s + sum(b - a for a, b in gaps_between(flying, start_s, end_s)) == pytest.approx(12)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_parts_are_by_rate(one: int, other: int) -> None:
    """Two prompts of the same time share in proportion to their tokens; alone, each has all."""
    flights, (first, second, alone) = fly([(0, 10, one), (0, 10, other), (20, 10, one)])
    parts = [flights.parts(flight)[0] for flight in (first, second)]
    assert [part.reserved_s for part in parts] == pytest.approx([one / (one + other), other / (one + other)])
    assert alone.alone
    assert flights.parts(alone)[0].mid == (1.0,)
