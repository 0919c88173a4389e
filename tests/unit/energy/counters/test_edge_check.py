"""What no hardware can have used makes no figure: each step of a counter is proved by its own power."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.energy.counters.base import CounterLost, Source
from deployments.energy.counters.edge_check import EdgeCheck
from deployments.energy.counters.powercap import DiePackage, PowercapZone, probe_powercap
from deployments.energy.meter import Meter
from tests.support.fake_counters import FakeCounter, ManualClock, set_energy, write_zone

INTEL_UJ, AMD_UJ = 262_143_328_850, 65_532_610_987
"""Ranges of real zones."""


def polled(source: Source, show: Callable[[float], None], times_s: list[float]) -> Meter:
    """A meter that looked at a source at these times; ``show`` sets its hardware to what it is then."""
    clock = ManualClock(times_s[0])
    show(clock.now_s)
    meter = Meter([source], clock=clock)
    for clock.now_s in times_s:
        show(clock.now_s)
        meter.poll_once()
    return meter


def every_50_ms(start_s: float, end_s: float) -> list[float]:
    return [start_s + tick / 20 for tick in range(round((end_s - start_s) * 20) + 1)]


def flags_over(meter: Meter, start_s: float, end_s: float) -> set[str]:
    """The flags of a window that must have no figure."""
    energy = meter.window(start_s, end_s)
    assert energy.total_j is None
    return set(energy.flags)


def test_jump_of_a_gpu_counter_makes_no_figure() -> None:
    """300 W for 600 s are 180 kJ. A jump of 100 kJ in 50 ms would be 2 MW: windows over it have no figure, not 280 kJ.

    Windows before and after it are as good as ever.
    """
    gpu = FakeCounter(
        lambda now_s: 300 * now_s + (100_000 if now_s > 1300 else 0), name="gpu:x", max_age_s=None, limit_w=700.0
    )
    meter = polled(gpu, lambda now_s: None, every_50_ms(1000, 1601))
    assert "implausible_power" in flags_over(meter, 1000.5, 1600.5)
    assert meter.window(1001, 1299).total_j == pytest.approx(300 * 298)
    assert meter.window(1302, 1600).total_j == pytest.approx(300 * 298)


def test_glitch_of_a_counter_makes_no_figure() -> None:
    """One wrong reading, up and down again, is two holes and no joules; the flag says which came last."""
    gpu = FakeCounter(lambda now_s: 300 * now_s + (5000 if 1010 < now_s < 1010.06 else 0), name="gpu:x", limit_w=700.0)
    meter = polled(gpu, lambda now_s: None, every_50_ms(1000, 1020))
    assert flags_over(meter, 1005, 1015) & {"implausible_power", "counter_reset"}
    assert meter.window(1011, 1019).total_j == pytest.approx(2400)


def test_limit_that_was_raised_explains_more_power() -> None:
    """A limit that an operator raises from 350 W to 700 W is read when a step needs it, so nothing is lost."""

    class Raised(FakeCounter):
        def read_limit(self) -> None:
            self.limit_w = 700.0

    gpu = Raised(lambda now_s: 690 * now_s, name="gpu:x", limit_w=350.0)
    meter = polled(gpu, lambda now_s: None, every_50_ms(1000, 1005))
    assert meter.window(1001, 1003).total_j == pytest.approx(1380)


def test_limits_are_read_every_ten_seconds() -> None:
    """A limit is not read once only: after 10 s the next poll reads it again, and bounds follow."""
    read: list[float] = []

    class Told(FakeCounter):
        def read_limit(self) -> None:
            read.append(self.read(0.0))

    polled(Told(lambda now_s: now_s, limit_w=300.0), lambda now_s: None, every_50_ms(1000, 1025))
    assert len(read) == 2


# --- powercap ----------------------------------------------------------------------------------------------


def zone_meter(
    tmp_path: Path, uj: Callable[[float], float], times_s: list[float], *, range_uj: int = INTEL_UJ
) -> Meter:
    """One package zone without a power limit; ``uj`` is what it shows."""
    zone = write_zone(tmp_path, "intel-rapl:0", "package-0", energy_uj=int(uj(times_s[0])), range_uj=range_uj)
    return polled(PowercapZone("package-0", zone), lambda now_s: set_energy(zone, int(uj(now_s))), times_s)


def test_reset_above_half_the_range_is_no_wrap(tmp_path: Path) -> None:
    """20 W for 10 s are 200 J. At 200.1 kJ of 262.1 kJ the zone starts from 0: read as a wrap that is 62,243 J.

    62,043 J in 50 ms would be 1.2 MW, so it was a reset, and there is no figure over it.
    """
    top_uj = 200_100e6
    meter = zone_meter(
        tmp_path, lambda t: 20e6 * (t - 1000) + (top_uj if t < 1005 else -100e6), every_50_ms(1000, 1010.2)
    )
    assert "counter_reset" in flags_over(meter, 1000.1, 1010.1)
    assert meter.window(1006, 1010).total_j == pytest.approx(80, rel=0.01)


def test_reset_close_below_the_range_is_no_wrap(tmp_path: Path) -> None:
    """A reset 200 J below the top could be a wrap by its size; 200 J in 50 ms are 4 kW, more than any package takes."""
    meter = zone_meter(
        tmp_path, lambda t: (INTEL_UJ - 200e6) if t < 1005 else 20e6 * (t - 1005), every_50_ms(1000, 1010)
    )
    assert "implausible_power" in flags_over(meter, 1001, 1009)


def test_wrap_is_counted(tmp_path: Path) -> None:
    """A zone that wraps at 100 W is counted on: 10 s are 1,000 J."""
    meter = zone_meter(tmp_path, lambda t: (100e6 * (t - 1000) + INTEL_UJ - 500e6) % INTEL_UJ, every_50_ms(1000, 1011))
    assert meter.window(1000.5, 1010.5).total_j == pytest.approx(1000, rel=0.001)


@pytest.mark.parametrize("range_uj", [AMD_UJ, INTEL_UJ])
def test_poller_that_stopped_makes_no_figure(tmp_path: Path, range_uj: int) -> None:
    """A zone without a limit, not read for 300 s may have wrapped: 1.8 kW fill 65.5 kJ in 36 s, 262 kJ in 146 s.

    So nothing is known of that time, whatever it shows afterwards.
    """
    times_s = [*every_50_ms(1000, 1005), *every_50_ms(1305, 1310)]
    meter = zone_meter(tmp_path, lambda t: (300e6 * (t - 1000)) % range_uj, times_s, range_uj=range_uj)
    assert "poll_gap" in flags_over(meter, 1001, 1309)
    assert meter.window(1306, 1309).total_j == pytest.approx(900, rel=0.01)


def test_fall_after_a_pause_is_no_wrap(tmp_path: Path) -> None:
    """After 30 s without a reading a fall of 40 kJ may be a wrap at 1 kW or a reset: nobody can tell, so no figure."""
    times_s = [*every_50_ms(1000, 1005), *every_50_ms(1035, 1040)]
    meter = zone_meter(tmp_path, lambda t: INTEL_UJ - 40e9 if t < 1030 else 20e6 * (t - 1030), times_s)
    assert "poll_gap" in flags_over(meter, 1001, 1039)


def test_register_that_is_full_is_no_limit(tmp_path: Path) -> None:
    """4,095.875 W is the most that a RAPL limit can hold: such a zone has none, and 1.5 kW stands for it."""
    zone = write_zone(tmp_path, "intel-rapl:0", "package-0", limits_uw=[4_095_875_000])
    source = PowercapZone("package-0", zone)
    assert source.limit_w is None
    assert source.max_rate == pytest.approx(1800)


def dies(tmp_path: Path, second: Callable[[float], float]) -> tuple[DiePackage, Callable[[float], None]]:
    """A package of two dies, the first of which takes 34 W; ``second`` is what the other shows, µJ."""
    zones = [write_zone(tmp_path, f"intel-rapl:{die}", f"package-0-die-{die}", range_uj=AMD_UJ) for die in (0, 1)]

    def show(now_s: float) -> None:
        set_energy(zones[0], int(34e6 * now_s))
        set_energy(zones[1], int(second(now_s)))

    [package] = [source for source in probe_powercap(tmp_path) if isinstance(source, DiePackage)]
    return package, show


def test_dies_that_mirror_one_counter_are_counted_once(tmp_path: Path) -> None:
    """34 W for 20 s are 680 J. Both dies of the package show that one counter: not 1,360 J, and it is told."""
    package, show = dies(tmp_path, lambda now_s: 34e6 * now_s)
    meter = polled(package, show, every_50_ms(1000, 1021))
    energy = meter.window(1000.5, 1020.5)
    assert energy.total_j == pytest.approx(680, rel=0.001)
    assert "counted once" in energy.components[0].source
    assert energy.boundary == ("package-0",)


def test_a_mirror_that_shows_the_counter_of_a_moment_ago_is_counted_once(tmp_path: Path) -> None:
    """The second die shows what the first did 1 ms before, 34 mJ less: still 680 J in 20 s, and not 1,360 J."""
    package, show = dies(tmp_path, lambda now_s: 34e6 * (now_s - 0.001))
    meter = polled(package, show, every_50_ms(1000, 1021))
    energy = meter.window(1000.5, 1020.5)
    assert energy.total_j == pytest.approx(680, rel=0.001)
    assert "counted once" in energy.components[0].source


def test_dies_with_counters_of_their_own_are_both_counted(tmp_path: Path) -> None:
    """34 W and 10 W for 20 s are 880 J, from the first reading on, though both counters move."""
    package, show = dies(tmp_path, lambda now_s: 10e6 * now_s)
    meter = polled(package, show, every_50_ms(1000, 1021))
    assert meter.window(1000, 1020).total_j == pytest.approx(880, rel=0.001)


def test_dies_are_not_counted_before_it_is_known(tmp_path: Path) -> None:
    """Dies that show the same and do not move may be one counter or two: no reading until three moves have told."""
    package, show = dies(tmp_path, lambda now_s: 34e6 * now_s)
    meter = polled(package, show, [1000.0, 1000.0, 1000.05, 1000.1])
    told = meter.describe()["sources"]
    assert isinstance(told, list)
    assert (told[0]["readings"], told[0]["failures"]) == (0, 4)
    assert "not known yet" in told[0]["last_error"]


# --- the check itself --------------------------------------------------------------------------------------


def test_step_by_hand() -> None:
    """A counter of unknown period: 10 J at 1.0 s, 40 J at 2.0 s. The step began after 0.9 s, so 30 J took up to 1.1 s.

    28 W explain it (30.8 J), 27 W do not (29.7 J). The first step is not known to have begun at any time.
    """
    for max_rate, flag in ((28.0, None), (27.0, "implausible_power")):
        check = EdgeCheck(max_age_s=None, step=0.0)
        check.add(0.9, 0.9, 0.0, max_rate)
        check.add(1.0, 1.0, 10.0, max_rate)
        if flag is None:
            check.add(2.0, 2.0, 40.0, max_rate)
        else:
            with pytest.raises(CounterLost, match=flag):
                check.add(2.0, 2.0, 40.0, max_rate)


def test_time_of_a_step_includes_the_age_of_readings() -> None:
    """A reading that may be 0.5 s old: 90 J between readings at 1 s and 2 s took up to 1.5 s, so 60 W are enough."""
    check = EdgeCheck(max_age_s=0.5, step=0.0)
    check.add(1.0, 1.0, 0.0, 60.0)
    check.add(2.0, 2.0, 90.0, 60.0)
    with pytest.raises(CounterLost, match="implausible_power"):
        check.add(3.0, 3.0, 190.0, 60.0)
