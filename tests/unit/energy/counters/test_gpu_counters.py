"""GPUs whose power is sampled, and GPUs whose counter is that of a whole module."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.energy.counters.base import CounterLost, Source, Unreadable
from deployments.energy.counters.nvml import GPUPower
from deployments.energy.counters.probe import probe_sources
from deployments.energy.figures import CPUModel, Energy, SCISettings
from deployments.energy.meter import Meter
from registry.wire.labels import Label
from tests.support.fake_counters import UUID, FakeGPU, FakeNVML, ManualClock, PowerCurve, install_nvml, write_zone

IDLE_W, BUSY_W = 100.0, 600.0
BUSY_S = 1010.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    """A GPU without an energy counter."""
    gpu = FakeGPU()
    gpu.energy_mj = None
    install_nvml(monkeypatch, FakeNVML(gpu))
    return gpu


def probed(tmp_path: Path) -> list[Source | Unreadable]:
    model = CPUModel(0.5, 4.0, 0.25, 1.0, 2.0, 8.0, "a data sheet")
    settings = SCISettings(1.0, "output_token", True, None, model)
    return probe_sources([UUID], pid=os.getpid(), settings=settings, powercap_root=tmp_path / "powercap")


def sampled(gpu: FakeGPU, busy_for_s: float, *, instant: bool) -> Callable[[float, float], Energy]:
    """Windows of a GPU of 100 W that takes 600 W for some seconds; NVML's plain power is the mean of the last one."""
    curve = PowerCurve(1000.0, [(BUSY_S - 1000, IDLE_W), (busy_for_s, BUSY_W), (1, IDLE_W)])
    clock = ManualClock(1001.0)

    def show() -> None:
        gpu.power_mw = round((curve.joules(clock.now_s) - curve.joules(clock.now_s - 1)) * 1000)
        gpu.instant_mw = (
            round((curve.joules(clock.now_s + 1e-4) - curve.joules(clock.now_s)) * 1e7) if instant else None
        )

    show()
    [source] = [source for source in probe_sources_of(gpu) if isinstance(source, GPUPower)]
    meter = Meter([source], clock=clock)
    for clock.now_s in [1001 + tick / 20 for tick in range(600)]:
        if clock.now_s == BUSY_S:
            meter.work_begins(BUSY_S)
        show()
        meter.poll_once()
    meter.work_ends(BUSY_S + busy_for_s)
    return meter.window


def probe_sources_of(gpu: FakeGPU) -> list[Source | Unreadable]:
    settings = SCISettings(1.0, "output_token", True, None, None)
    return probe_sources([gpu.uuid], pid=os.getpid(), settings=settings)


def test_half_a_second_of_averaged_power_is_too_short(gpu: FakeGPU) -> None:
    """0.5 s at 600 W are 300 J. Power that is the mean of a second shows 112.5 J of them by their end.

    After 0.5 s half of the second was at 600 W: 350 W. From 100 W to 350 W that is 225 W in the mean, 112.5 J.
    The bounds of what it shows contain nothing for certain, so there is no measured figure: it is too short.
    """
    energy = sampled(gpu, 0.5, instant=False)(BUSY_S, BUSY_S + 0.5)
    assert energy.total_j is None
    assert "too_short" in energy.flags


@pytest.mark.parametrize("busy_for_s", [2.0, 3.3, 8.0])
def test_averaged_power_has_the_truth_in_its_bounds(gpu: FakeGPU, busy_for_s: float) -> None:
    """2 s at 600 W are 1,200 J: the figure lies within its resolution of that, and says how it was sampled."""
    energy = sampled(gpu, busy_for_s, instant=False)(BUSY_S, BUSY_S + busy_for_s)
    assert energy.total_j is not None
    assert energy.resolution_j is not None
    assert abs(energy.total_j - BUSY_W * busy_for_s) <= energy.resolution_j
    assert energy.label is Label.MEASURED_SAMPLED
    assert "each the mean of a second" in energy.components[0].source


def test_instant_power_is_preferred(gpu: FakeGPU) -> None:
    """Where NVML tells the power of the moment, 0.5 s at 600 W are a figure whose bounds contain 300 J."""
    energy = sampled(gpu, 0.5, instant=True)(BUSY_S, BUSY_S + 0.5)
    assert energy.total_j is not None
    assert energy.resolution_j is not None
    assert abs(energy.total_j - 300) <= energy.resolution_j
    assert "of the moment" in energy.components[0].source


def test_errors_of_samples_add_up_and_are_in_the_bounds(gpu: FakeGPU, tmp_path: Path) -> None:
    """100 times 120 ms at 600 W and 130 ms at 100 W are 8,500 J. Of samples that each came too late, 20 ms are missing.

    Power rises by 500 W: that shows in a sample at once, or up to a refresh (100 ms) and a gap (50 ms) later, so each
    change may be wrong by 500 W · 75 ms = 37.5 J, and 200 changes by 7,500 J. Here rises show 40 ms too late and falls
    at once, so about 100 · 500 W · 40 ms = 2,000 J are missing, much more than the samples' age says.
    """
    clock = ManualClock(1000.0)
    meter = Meter(probe_sources_of(gpu), clock=clock)
    for tick in range(20 * 30):
        clock.now_s = 1000 + tick / 20
        in_turn_s = (tick * 0.05) % 0.25
        busy = 1002 <= clock.now_s < 1027 and 0.049 < in_turn_s < 0.12
        gpu.power_mw = gpu.instant_mw = 600_000 if busy else 100_000
        meter.poll_once()
    energy = meter.window(1001.9, 1027.1)
    true_j = 100 * (600 * 0.12 + 100 * 0.13) + 0.2 * 100
    assert energy.label is Label.MEASURED_SAMPLED
    assert energy.total_j is not None
    assert energy.low_j is not None
    assert energy.high_j is not None
    assert energy.total_j < true_j - 500
    assert energy.low_j <= true_j <= energy.high_j


@pytest.mark.parametrize(("length_s", "gap_s"), [(0.06, 0.04), (0.5, 0.33)])
def test_power_of_the_moment_is_missed_between_two_samples(gpu: FakeGPU, length_s: float, gap_s: float) -> None:
    """A GPU's power is renewed every 100 ms and read every 50: hard bounds hold for what falls between, too.

    Prompts of 60 ms at 600 W every 100 ms lie between two renewals: all samples say 100 W, so 6 J of a true 36 J. They
    may be wrong by the limit of 1.2 · 700 W for 0.15 s, 126 J: `too_short`. One of 0.5 s is seen, and may be told for
    0.15 s too long or too short, 500 W · 0.15 s = 75 J.
    """
    clock, steps = ManualClock(1000.0), [(1.07, IDLE_W)]
    prompts = [1001.07 + number * (length_s + gap_s) for number in range(40)]
    steps += [(length_s, BUSY_W), (gap_s, IDLE_W)] * 40
    curve = PowerCurve(1000.0, [*steps, (5.0, IDLE_W)])
    gpu.power_mw = gpu.instant_mw = 100_000
    [source] = [source for source in probe_sources_of(gpu) if isinstance(source, GPUPower)]
    meter = Meter([source], clock=clock)
    changes = [(at_s, begins) for begin_s in prompts for at_s, begins in ((begin_s, 1), (begin_s + length_s, 0))]
    for clock.now_s in [1000.0 + tick / 20 for tick in range(round((prompts[-1] - 998) * 20))]:
        while changes and changes[0][0] <= clock.now_s:
            at_s, begins = changes.pop(0)
            (meter.work_begins if begins else meter.work_ends)(at_s)
        renewed_s = 1000.05 + round((clock.now_s - 1000.05) * 10 - 0.49) / 10
        gpu.instant_mw = round((curve.joules(renewed_s) - curve.joules(renewed_s - 1e-4)) * 1e7)
        meter.poll_once()
    for begin_s in prompts[1:]:
        energy = meter.window(begin_s, begin_s + length_s, estimate_short=True)
        assert energy.low_j is not None
        assert energy.high_j is not None
        assert energy.low_j <= BUSY_W * length_s <= energy.high_j
        assert ("too_short" in energy.flags) == (length_s < 0.1)


def test_sample_beyond_the_limit_is_no_power(gpu: FakeGPU) -> None:
    """A sample of 10 kW from a GPU of 700 W is a hole, not 500 J in 50 ms."""
    [source] = [source for source in probe_sources_of(gpu) if isinstance(source, GPUPower)]
    source.read(1.0)
    gpu.power_mw = 10_000_000
    with pytest.raises(CounterLost, match="implausible_power"):
        source.read(1.05)
    gpu.power_mw = 300_000
    assert source.read(1.10) == 0.0
    assert source.read(1.15) == pytest.approx(15.0)


# --- modules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NVIDIA GH200 480GB", "NVIDIA GH200 144G HBM3e", "NVIDIA GB200", "GB300"])
def test_counter_of_a_module_has_the_cpu_in_it(gpu: FakeGPU, tmp_path: Path, name: str) -> None:
    """A Grace module of 900 W is counted once: by NVML, without RAPL or a model on top, and nothing is missing.

    In 2 s that is 900 W · 2 s = 1,800 J, whatever a package zone beside it may show.
    """
    gpu.name, gpu.energy_mj = name, 0
    write_zone(tmp_path / "powercap", "intel-rapl:0", "package-0")
    clock = ManualClock()
    found = probed(tmp_path)
    meter = Meter(found, clock=clock)
    for tick in range(100):
        clock.now_s = 1000 + tick / 20
        gpu.energy_mj = round(900_000 * (clock.now_s - 1000))
        meter.poll_once()
    energy = meter.window(1001, 1003)
    assert energy.total_j == pytest.approx(1800, rel=0.01)
    assert (energy.label, energy.flags) == (Label.MEASURED, ())
    assert energy.boundary == (f"gpu:{UUID}",)
    assert "module" in energy.components[0].source


def test_power_of_a_module_is_compared_with_that_of_the_module(gpu: FakeGPU, tmp_path: Path) -> None:
    """The counter of a module is checked by the module's power, not by the GPU's; if that is not told, by none."""
    gpu.name, gpu.energy_mj = "NVIDIA GH200 480GB", 0
    [source] = [source for source in probed(tmp_path) if isinstance(source, Source)]
    assert source.power_w() is None
    gpu.module_mw = 900_000
    assert source.power_w() == 900.0


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA B200", "NVIDIA A100-SXM4-80GB"])
def test_other_gpus_are_no_modules(gpu: FakeGPU, tmp_path: Path, name: str) -> None:
    """The counter of any other GPU has no CPU in it: that is counted beside it."""
    gpu.name, gpu.energy_mj = name, 0
    write_zone(tmp_path / "powercap", "intel-rapl:0", "package-0")
    names = [source.name for source in probed(tmp_path) if isinstance(source, Source)]
    assert names == [f"gpu:{UUID}", "package-0"]


@pytest.mark.parametrize(("second_mj", "joules"), [(5_000_000, 4.0), (9_000_000, 8.0)])
def test_two_gpus_of_one_module_are_counted_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, second_mj: int, joules: float
) -> None:
    """Two GPUs of a GB200 show one counter, which rises by 1 J a poll: 4 J, not 8 J, and it is told.

    Where the second shows another counter, it is that of another module: both are counted.
    """
    gpus = FakeGPU(), FakeGPU("GPU-2")
    for gpu in gpus:
        gpu.name = "NVIDIA GB200"
    gpus[1].energy_mj = second_mj
    install_nvml(monkeypatch, FakeNVML(*gpus))
    settings = SCISettings(1.0, "output_token", allow_estimates=False)
    found = probe_sources([gpu.uuid for gpu in gpus], pid=1, settings=settings, powercap_root=tmp_path)
    clock = ManualClock(1000.0)
    meter = Meter(found, clock=clock)
    for _ in range(40):
        clock.now_s += 0.05
        meter.poll_once()
        for gpu in gpus:
            gpu.energy_mj = (gpu.energy_mj or 0) + 1000
    energy = meter.window(1001.0, 1001.2)
    assert energy.total_j == pytest.approx(joules)
    assert ("counted once" in energy.components[0].source) is (joules == 4.0)
    assert "cpu_not_covered" not in energy.flags


@pytest.mark.parametrize(("other_mj", "joules"), [(5_000_000, None), (9_000_000, 4.0)])
def test_module_of_two_wrappers_is_charged_to_neither(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other_mj: int, joules: float | None
) -> None:
    """Two wrappers have a GPU each of one GB200: its counter rises by 1 J a poll, and both would say 4 J of 4 J: 8 J.

    Which part is whose nobody can say: no figure, and a flag. Where the other GPU is one of another module, all 4 J are
    the wrapper's. NVML is given back as often as it was opened.
    """
    gpus = FakeGPU(), FakeGPU("GPU-2")
    for gpu in gpus:
        gpu.name = "NVIDIA GB200"
    gpus[1].energy_mj = other_mj
    nvml = install_nvml(monkeypatch, FakeNVML(*gpus))
    settings = SCISettings(1.0, "output_token", allow_estimates=True)
    found = probe_sources([UUID], pid=1, settings=settings, powercap_root=tmp_path, on_machine=2)
    clock = ManualClock(1000.0)
    meter = Meter(found, clock=clock)
    for _ in range(40):
        clock.now_s += 0.05
        meter.poll_once()
        for gpu in gpus:
            gpu.energy_mj = (gpu.energy_mj or 0) + 1000
    energy = meter.window(1001.0, 1001.2)
    assert energy.total_j == (None if joules is None else pytest.approx(joules))
    assert ("module_shared" in energy.flags) is (joules is None)
    assert energy.boundary == (f"gpu:{UUID}",)
    assert meter.stop()
    assert nvml.opened == 0


def test_module_whose_neighbours_are_not_told_is_a_hole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where NVML does not list the machine's GPUs one of several wrappers can't tell whose counter its GPU shows.

    900 W for 2 s may be its own 1,800 J, or those of two: no figure, with NVML's words.
    """
    gpu = FakeGPU()
    gpu.name = "NVIDIA GB200"
    nvml = install_nvml(monkeypatch, FakeNVML(gpu, missing=["nvmlDeviceGetCount"]))
    settings = SCISettings(1.0, "output_token", allow_estimates=True)
    [hole, _] = probe_sources([UUID], pid=1, settings=settings, powercap_root=tmp_path, on_machine=2)
    assert isinstance(hole, Unreadable)
    assert (hole.name, hole.in_boundary) == (f"gpu:{UUID}", True)
    assert "Function Not Found" in hole.why
    assert nvml.opened == 0


def test_counters_of_two_modules_step_at_times_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two modules of 300 W; the counter of one stands still for 3 s while the other's steps every 50 ms.

    In one second of that 600 J flowed, but 300 J of them show later.
    The bounds contain 600 J, as the edges of the one counter tell nothing of the other.
    """
    gpus = FakeGPU(), FakeGPU("GPU-2")
    gpus[1].energy_mj = 9_000_000
    for gpu in gpus:
        gpu.name = "NVIDIA GH200 480GB"
    install_nvml(monkeypatch, FakeNVML(*gpus))
    settings = SCISettings(1.0, "output_token", allow_estimates=False)
    found = probe_sources([gpu.uuid for gpu in gpus], pid=1, settings=settings, powercap_root=tmp_path)
    clock = ManualClock(1000.0)
    meter = Meter(found, clock=clock)
    for poll in range(200):
        clock.now_s = 1000 + poll / 20
        gpus[0].energy_mj = 5_000_000 + 15_000 * poll
        if not 80 < poll < 140:
            gpus[1].energy_mj = 9_000_000 + 15_000 * poll
        meter.poll_once()
    energy = meter.window(1004.5, 1005.5, estimate_short=True)
    assert energy.low_j is not None
    assert energy.high_j is not None
    assert energy.low_j <= 600 <= energy.high_j
