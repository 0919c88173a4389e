"""Whether a counter can be believed, and GPUs that only zeus knows."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from deployments.energy import build
from deployments.energy.build import sci_settings
from deployments.energy.counters import zeus as zeus_source
from deployments.energy.counters.counter_check import CHECK_S, Check, CounterCheck
from deployments.energy.counters.probe import CounterLost, Source, Unreadable
from deployments.energy.counters.zeus import zeus_gpus
from deployments.energy.meter import Meter
from deployments.machine.gpus import ReadFailed
from registry.settings import EnergySettings
from registry.wire.flags import Flag
from registry.wire.labels import Label
from tests.support.fake_counters import FakeCounter, ManualClock

WATTS = 100.0


class ToldPower(FakeCounter):
    """A counter of steps of 100 ms beside power samples of 100 W."""

    told_w: float | None = WATTS

    def power_w(self) -> float | None:
        return self.told_w


def watched(factor: float, told_w: float | None = WATTS) -> Meter:
    """A meter that was polled for longer than counters are watched."""
    clock = ManualClock()
    source = ToldPower(lambda now_s: factor * WATTS * int(now_s * 10 + 1e-6) / 10, name="gpu:x", max_age_s=None)
    source.told_w = told_w
    meter = Meter([source], clock=clock)
    for _ in range(round((CHECK_S + 1) / 0.02)):
        meter.poll_once()
        clock.now_s += 0.02
    return meter


def only_check(meter: Meter) -> Any:
    checks: Any = meter.describe()["checks"]
    [check] = checks
    return check


def flags_of(meter: Meter) -> tuple[str, ...]:
    return meter.window(1001.0, 1005.0).flags


def test_counter_that_agrees() -> None:
    """A counter is told with its period, and its joules beside those of the power samples."""
    meter = watched(1.0)
    check = only_check(meter)
    assert check["period_s"] == pytest.approx(0.1)
    assert check["counter_j"] == pytest.approx(check["power_j"], rel=0.01)
    assert (check["source"], check["agrees"]) == ("gpu:x", True)
    assert "counter_disagrees" not in flags_of(meter)


@pytest.mark.parametrize("factor", [0.5, 1.2, 1000.0])
def test_counter_that_disagrees_flags_every_window(factor: float) -> None:
    """A counter that counts other joules than the power tells is told, and every window of it flagged."""
    meter = watched(factor)
    check = only_check(meter)
    assert check["agrees"] is False
    assert "counter_disagrees" in flags_of(meter)


def test_without_power_nothing_is_said() -> None:
    """Where no power is told a counter can't be compared: that is no disagreement."""
    meter = watched(1.0, told_w=None)
    check = only_check(meter)
    assert (check["power_j"], check["agrees"]) == (None, None)
    assert "counter_disagrees" not in flags_of(meter)


def test_counter_that_never_moves() -> None:
    """A counter that stands still has no period, and nothing to compare."""
    assert watched(0.0).describe()["checks"] == [
        {
            "source": "gpu:x",
            "seconds": CHECK_S,
            "period_s": None,
            "counter_j": None,
            "power_j": None,
            "agrees": None,
            "loaded": False,
        }
    ]


def test_counters_of_known_period_are_not_watched() -> None:
    """A source that tells how old its readings are needs no watching."""
    clock = ManualClock()
    meter = Meter([FakeCounter(lambda now_s: now_s)], clock=clock)
    for _ in range(300):
        meter.poll_once()
        clock.now_s += 0.05
    assert meter.describe()["checks"] == []


def test_a_hole_begins_the_watching_anew() -> None:
    """What was seen before a counter was lost is not compared with what came after."""
    clock, lost = ManualClock(), CounterLost(Flag.COUNTER_RESET)
    source = ToldPower(lambda now_s: lost if now_s == 1005.0 else now_s * WATTS, name="gpu:x", max_age_s=None)
    meter = Meter([source], clock=clock)
    for tick in range(60):
        clock.now_s = 1000.0 + tick / 4
        meter.poll_once()
        assert bool(meter.describe()["checks"]) == (clock.now_s >= 1005.25 + CHECK_S)


def test_check_by_hand() -> None:
    """Counter and power are compared between the first and the last step of the counter."""
    check = CounterCheck("x")
    for tick in range(12):
        check.add(float(tick), float(tick // 2 * 10), 5.0)
    assert check.found == [Check("x", 8.0, 2.0, 40.0, 40.0, agrees=True)]


class Hardware:
    """A counter of 100 ms steps that is right when idle, and counts ``part`` of what is used above 100 W."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.watts, self.part = 100.0, 1.0
        self.asked = 0
        self.joules = 0.0
        outer = self

        class Counter(FakeCounter):
            def power_w(self) -> float | None:
                outer.asked += 1
                return outer.watts

        self.source = Counter(lambda now_s: self.joules, name="gpu:x", max_age_s=None)
        self.meter = Meter([self.source], clock=self.clock)

    def run(self, seconds: float, watts: float, step_s: float = 0.1) -> None:
        self.watts = watts
        for _ in range(round(seconds / step_s)):
            self.clock.now_s += step_s
            self.joules += step_s * (min(watts, 100) + self.part * max(watts - 100, 0))
            self.meter.poll_once()

    def prompt(self, seconds: float, watts: float) -> None:
        self.meter.work_begins(self.clock.now_s)
        self.run(seconds, watts)
        self.meter.work_ends(self.clock.now_s)

    @property
    def checks(self) -> list[Any]:
        found: Any = self.meter.describe()["checks"]
        return list(found)

    def disagrees(self) -> bool:
        return "counter_disagrees" in self.meter.window(self.clock.now_s - 2, self.clock.now_s - 1).flags


def test_counter_that_is_wrong_under_load_is_found() -> None:
    """A counter that is right at 100 W and 40 % low above that passes at rest, and is flagged once it works.

    At 700 W it counts 100 + 0.6 * 600 = 460 W, 34 % low.
    """
    gpu = Hardware()
    gpu.part = 0.6
    gpu.run(60, 100)
    assert not gpu.disagrees()
    gpu.run(60, 700)
    assert gpu.disagrees()
    idle, loaded = gpu.checks
    assert (idle["agrees"], idle["loaded"]) == (True, False)
    assert (loaded["agrees"], loaded["loaded"]) == (False, True)
    assert loaded["counter_j"] / loaded["power_j"] == pytest.approx(460 / 700, rel=0.01)


def test_counter_that_is_wrong_in_short_prompts_is_found() -> None:
    """A prompt of 1 s every minute: the power is looked at beside each, and after 30 of them it is found.

    Each takes 700 J, and the counter counts 460 J. Until its step after the next second it counts 1.1 s more of 100 W:
    570 J. The power told 700 J, 40 J while it fell within a step, and 100 J: 840 J.
    """
    gpu = Hardware()
    gpu.part = 0.6
    gpu.run(60, 100)
    for prompt in range(31):
        assert not (gpu.disagrees() and prompt < 30)
        gpu.prompt(1, 700)
        gpu.run(59, 100)
    assert gpu.disagrees()
    loaded = gpu.checks[-1]
    assert loaded["loaded"]
    assert loaded["counter_j"] / loaded["power_j"] == pytest.approx(570 / 840, rel=0.01)


def test_short_prompts_of_a_right_counter_agree() -> None:
    """The same prompts with a counter that is right: no disagreement, and the power is not looked at any more."""
    gpu = Hardware()
    gpu.run(60, 100)
    for _ in range(31):
        gpu.prompt(1, 700)
        gpu.run(59, 100)
    assert gpu.checks[-1]["loaded"]
    assert not gpu.disagrees()
    asked = gpu.asked
    gpu.prompt(5, 700)
    assert gpu.asked - asked <= 1


def test_counter_that_disagrees_is_no_measurement() -> None:
    """A counter that counted 460 W of 700 W: a window of 10 s is modelled, and its bounds contain 7,000 J.

    4,600 J are told. The power says 7,000 of 4,600, or, if the counter is right when idle, 600 of 360 above 100 W.
    """
    gpu = Hardware()
    gpu.part = 0.6
    gpu.run(60, 100)
    gpu.run(60, 700)
    energy = gpu.meter.window(gpu.clock.now_s - 12, gpu.clock.now_s - 2)
    assert (energy.label, energy.counter_label) == (Label.MODELED, Label.MEASURED)
    assert energy.total_j == pytest.approx(4600, rel=0.02)
    assert energy.low_j == pytest.approx(4600, rel=0.02)
    assert energy.high_j == pytest.approx(4600 * 600 / 360 * 1.05, rel=0.03)
    assert energy.systematic_j is not None
    assert energy.systematic_j >= 7000 - 4600


def test_disagreement_holds_at_rest_until_load_tells_otherwise() -> None:
    """What was found under load is not outdone by a check at rest, but by the next one under load."""
    gpu = Hardware()
    gpu.part = 0.6
    gpu.run(60, 100)
    gpu.run(60, 700)
    gpu.run(700, 100, step_s=0.5)
    assert gpu.disagrees()
    gpu.part = 1.0
    gpu.run(60, 700)
    assert not gpu.disagrees()


def test_counter_is_checked_again_every_day_and_after_a_reset() -> None:
    """A counter that goes wrong is found at the next daily check; a reset brings one at once.

    At 60 W it then counts twice as much, 1,200 J in 10 s where the power tells 600 J. From 0 on it is right again:
    within 10 s of the reset it counts the 600 J that the power tells.
    """
    gpu = Hardware()
    gpu.run(20, 50)
    gpu.watts, gpu.part = 100.0, 1.0
    gpu.run(100, 60)
    honest = gpu.joules
    assert not gpu.disagrees()
    gpu.source.value = lambda now_s: gpu.joules + (gpu.joules - honest)  # twice as much from now on
    gpu.run(600, 60, step_s=0.5)
    assert not gpu.disagrees()
    gpu.clock.now_s += 86_400
    gpu.run(40, 60)
    assert gpu.disagrees()
    reset_j = gpu.joules
    gpu.source.value = lambda now_s: gpu.joules - reset_j
    gpu.run(CHECK_S + 2, 60)
    assert not gpu.disagrees()


def test_load_that_begins_first_is_not_taken_for_idle() -> None:
    """A wrapper that starts under load finds the idle power later, and then both findings."""
    gpu = Hardware()
    gpu.run(60, 700)
    gpu.run(60, 100)
    assert [(check["loaded"], check["agrees"]) for check in gpu.checks] == [(False, True), (True, True)]


def test_power_that_jumps_while_it_is_watched_tells_nothing() -> None:
    """Power that is smeared over a second can't be compared while it rises from 100 W to 700 W: it is tried again."""
    gpu = Hardware()
    gpu.run(5, 100)
    gpu.run(6, 700)
    assert gpu.checks == []
    gpu.run(60, 700)
    [check] = gpu.checks
    assert check["agrees"] is True


def test_power_is_read_seldom_between_checks() -> None:
    """Reading the power costs, too: after a check it is read once in ten seconds."""
    gpu = Hardware()
    gpu.run(20, 100)
    asked = gpu.asked
    gpu.run(100, 100)
    assert gpu.asked - asked <= 11


# --- zeus --------------------------------------------------------------------------------------------------


class ZeusGPUs:
    """What `zeus.device.get_gpus` gives, with the names of zeus 0.16."""

    def __init__(self, *gpus: Any) -> None:
        self.gpus = gpus


def amd(energy_mj: int | Exception = 5_000, *, counter: bool = True, limit_mw: int | Exception = 750_000) -> Any:
    def get(value: int | Exception) -> int:
        if isinstance(value, Exception):
            raise value
        return value

    return SimpleNamespace(
        supports_get_total_energy_consumption=lambda: counter,
        get_total_energy_consumption=lambda: get(energy_mj),
        get_power_management_limit=lambda: get(limit_mw),
        get_instant_power_usage=lambda: get(limit_mw) // 2,
    )


@pytest.fixture
def zeus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A zeus that finds one AMD GPU."""
    package, device = ModuleType("zeus"), ModuleType("zeus.device")
    device.get_gpus = lambda: ZeusGPUs(amd())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zeus", package)
    monkeypatch.setitem(sys.modules, "zeus.device", device)
    monkeypatch.setattr(zeus_source, "find_spec", lambda name: name)
    return device


def test_zeus_counts_what_nvml_does_not_know(zeus: ModuleType) -> None:
    """A GPU of zeus is a measured counter in joules, with the power limit and the power that it tells."""
    [source] = zeus_gpus(1)
    assert isinstance(source, Source)
    assert (source.name, source.label, source.limit_w) == ("gpu:zeus-0", Label.MEASURED, 750.0)
    assert (source.read(0.0), source.power_w(), source.contended(0.0)) == (5.0, 375.0, None)


@pytest.mark.parametrize(
    ("gpu", "why"),
    [(amd(counter=False), "no energy counter"), (amd(RuntimeError("no permission")), "no permission")],
    ids=["none", "fails"],
)
def test_gpu_that_zeus_can_not_read_is_a_hole(zeus: ModuleType, gpu: Any, why: str) -> None:
    """A GPU whose counter zeus can't read is inside the boundary all the same: nothing is ever 0 J."""
    zeus.get_gpus = lambda: ZeusGPUs(gpu)  # type: ignore[attr-defined]
    [hole] = zeus_gpus(1)
    assert isinstance(hole, Unreadable)
    assert hole.in_boundary
    assert why in hole.why


def test_zeus_that_finds_other_gpus_is_a_hole(zeus: ModuleType) -> None:
    """Zeus has to find as many GPUs as the wrapper holds; one that can't start is told with its reason."""
    [hole] = zeus_gpus(2)
    assert isinstance(hole, Unreadable)
    assert "not the 2 reserved" in hole.why
    zeus.get_gpus = lambda: amd(RuntimeError("no driver")).get_total_energy_consumption()  # type: ignore[attr-defined]
    [hole] = zeus_gpus(1)
    assert isinstance(hole, Unreadable)
    assert "no driver" in hole.why


def test_counter_of_zeus_that_fails_later(zeus: ModuleType) -> None:
    """A failed reading is one reading less; what else it does not tell is not known."""
    gpu = amd(limit_mw=RuntimeError("no limit"))
    zeus.get_gpus = lambda: ZeusGPUs(gpu)  # type: ignore[attr-defined]
    [source] = zeus_gpus(1)
    assert isinstance(source, Source)
    assert (source.limit_w, source.power_w()) == (None, None)
    gpu.get_total_energy_consumption = amd(RuntimeError("gone")).get_total_energy_consumption
    with pytest.raises(ReadFailed, match="gone"):
        source.read(1.0)


def test_zeus_is_asked_only_where_nvml_can_not_tell(zeus: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NVML does not know a wrapper's GPUs zeus is asked; without zeus they are holes, as ever."""

    def no_nvml(visible: str) -> tuple[str, ...]:
        raise ReadFailed("no NVML")

    monkeypatch.setattr(build, "gpu_uuids", no_nvml)
    monkeypatch.setattr(build, "probe_sources", lambda *_, **__: [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [source.name for source in build.sources_of(sci_settings(EnergySettings()), 1, None)] == ["gpu:zeus-0"]
    monkeypatch.setattr(zeus_source, "find_spec", lambda name: None)
    [hole] = build.sources_of(sci_settings(EnergySettings()), 1, None)
    assert hole == Unreadable("gpu:", "no NVML", in_boundary=True)
