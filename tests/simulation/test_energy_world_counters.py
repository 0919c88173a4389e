"""The counters and kernel files of tests/energy_world, against the simulated truth and examples computed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.energy_world.counters import Fault, GpuCounter, RaplCounter
from tests.energy_world.machine import KINDS, RARE_KINDS
from tests.energy_world.tree import Process
from tests.energy_world.truth import Steps
from tests.energy_world.world import EnergyWorld

pytestmark = pytest.mark.slow

seeds = st.integers(0, 10**6)
some_seeds = settings(max_examples=20, deadline=None)


def polls(world: EnergyWorld, every_s: float = 0.05) -> Iterator[float]:
    """Move the clock to the end of the history in steps."""
    while world.clock.now_s + every_s < world.horizon_s:
        world.clock.advance(every_s)
        yield world.clock.now_s


def first_world(kind: str, **wanted: bool) -> EnergyWorld:
    """Return the first world of a kind with (or without) faults of these kinds."""
    for seed in range(400):
        world = EnergyWorld(seed, kind)
        kinds = {fault.kind for fault in world.faults}
        if all((name in kinds) == there for name, there in wanted.items()):
            return world
    raise AssertionError(kind, wanted)


@pytest.mark.parametrize("kind", [*KINDS, *RARE_KINDS])
def test_every_kind_has_its_counters(kind: str) -> None:
    """GPUs have energy counters, and RAPL zones exist, exactly if the kind of machine says so."""
    world = EnergyWorld(1, kind)
    names = {zone.name for zone in world.zones}
    assert bool(world.machine.gpus) == (kind != "cpu_only")
    assert all(counter.has_energy == (kind != "sampled") for counter in world.gpu_counters)
    if kind in {"gh200", "no_rapl"}:
        assert not names
    elif kind in {"amd_mirrored", "intel_dies"}:
        assert {"package-0-die-0", "package-0-die-1", "package-1-die-0", "package-1-die-1"} <= names
    elif kind == "h200_amd":
        assert names == {"package-0", "package-1"}
    elif kind != "cpu_only":
        assert {"package-0", "dram"} <= names


def test_unknown_kind() -> None:
    """An unknown kind is refused."""
    with pytest.raises(ValueError, match="abacus"):
        EnergyWorld(1, "abacus")


@given(seeds)
@some_seeds
def test_nvml_counter_is_late_and_never_ahead(seed: int) -> None:
    """A counter without faults is never above the truth, and below it by at most the energy of one tick."""
    world = EnergyWorld(seed, "calm")
    for counter in world.gpu_counters:
        first_mj = counter.energy_mj(0.0)
        at_first_s = counter.ticks_s[counter.tick(0.0)]
        most_w = float(counter.power.values.max())
        last_mj = first_mj
        for now_s in np.arange(0.05, world.horizon_s, 0.37).tolist():
            shown_mj = counter.energy_mj(now_s)
            true_mj = counter.power.between(at_first_s, now_s) * 1000
            assert shown_mj - first_mj <= true_mj + 1
            assert true_mj - (shown_mj - first_mj) <= most_w * 1.3 * counter.tick_s * 1000 + 1
            assert shown_mj >= last_mj
            last_mj = shown_mj


def gpu_counter(*faults: Fault, low: float = 1.0) -> GpuCounter:
    """A counter at 100 W until 10 s, then 500 W until 20 s."""
    steps = Steps((0.0, 10.0, 20.0), (100.0, 500.0))
    return GpuCounter(Random(1), steps, 20.0, tick_s=0.02, faults=faults, low=low)


def test_nvml_faults_by_hand() -> None:
    """A jump adds 100 kJ. A stalled counter stops for 3 s, then has the true value again. A reset starts near zero."""
    plain = gpu_counter()
    assert plain.energy_mj(15.0) - plain.energy_mj(5.0) == pytest.approx(3_000_000, abs=10_000)
    jump = gpu_counter(Fault("jump", "gpu-0", 7.0, 7.0))
    assert jump.energy_mj(15.0) - jump.energy_mj(5.0) == pytest.approx(103_000_000, abs=10_000)
    stall = gpu_counter(Fault("stall", "gpu-0", 11.0, 14.0))
    assert stall.energy_mj(13.9) == stall.energy_mj(11.1)
    assert stall.energy_mj(15.0) == plain.energy_mj(15.0)
    reset = gpu_counter(Fault("reset", "gpu-0", 12.0, 12.0))
    assert reset.energy_mj(12.1) < 60_000
    assert reset.energy_mj(15.0) - reset.energy_mj(13.0) == pytest.approx(1_000_000, abs=10_000)
    low = gpu_counter(low=0.6)
    assert low.energy_mj(9.0) - low.energy_mj(1.0) == pytest.approx(800_000, abs=3_000)
    assert low.energy_mj(19.0) - low.energy_mj(11.0) == pytest.approx((100 + 0.6 * 400) * 8_000, abs=10_000)


def test_mean_power_by_hand() -> None:
    """0.5 s after a change from 100 W to 500 W, the mean of the last second is 300 W; the instant power is 500 W."""
    counter = gpu_counter()
    assert counter.mean_mw(10.5) == pytest.approx(300_000, abs=0.03 * 400_000)
    assert counter.instant_mw(10.5) == 500_000
    assert counter.mean_mw(12.0) == pytest.approx(500_000, abs=1)


def test_rapl_wraps_and_resets_by_hand() -> None:
    """At 100 W, a range of 1 kJ overflows every 10 s; a reset at 7 s starts at 0; values are always below the range."""
    steps = Steps((0.0, 60.0), (100.0,))
    counter = RaplCounter(steps, 1_000_000_000, 500_000_000)
    assert counter.energy_uj(4.0) == pytest.approx(900_000_000, abs=1e5 + 1)
    assert counter.energy_uj(6.0) == pytest.approx(100_000_000, abs=1e5 + 1)
    assert all(0 <= counter.energy_uj(at_s) < 1_000_000_000 for at_s in np.arange(0, 60, 0.0137).tolist())
    reset = RaplCounter(steps, 1_000_000_000, 100_000_000, [7.0])
    assert reset.energy_uj(6.9) == pytest.approx(790_000_000, abs=1e5 + 1)
    assert reset.energy_uj(8.0) == pytest.approx(100_000_000, abs=2e5 + 1)


@given(seeds)
@some_seeds
def test_rapl_unwrapped_is_the_truth(seed: int) -> None:
    """The sum of the differences (modulo the range) is the zone's energy, or less by at most 1 ms of its power."""
    world = EnergyWorld(seed, "calm")
    for zone in world.zones:
        counter = zone.counter
        shown_uj, last_uj = 0, counter.energy_uj(0.0)
        for now_s in np.arange(1.0, world.horizon_s, 1.0).tolist():
            now_uj = counter.energy_uj(now_s)
            shown_uj += (now_uj - last_uj) % counter.range_uj
            last_uj = now_uj
            true_uj = counter.power.integral(now_s) * 1e6
            # The range is a whole number of µJ, but the counter's unit is not, so an overflow may lose one unit.
            assert shown_uj <= true_uj + 200
            assert true_uj - shown_uj <= counter.power.values.max() * 1e3 + 200


def test_mirrors_show_one_counter() -> None:
    """The two counters of a mirrored package both show its whole energy, and differ by at most 1 ms of its power."""
    world = EnergyWorld(3, "amd_mirrored")
    for one, two in zip(world.zones[::2], world.zones[1::2], strict=True):
        assert one.counter is two.counter
        for now_s in np.arange(1.0, world.horizon_s, 7.7).tolist():
            behind_uj = (one.energy_uj(now_s) - two.energy_uj(now_s)) % one.counter.range_uj
            assert behind_uj <= 2.1e3 * one.counter.power.values.max()


def test_two_dies_make_a_package() -> None:
    """If each die has a counter of its own, only their sum is the package's energy."""
    world = EnergyWorld(3, "intel_dies")
    dies = [zone for zone in world.zones if zone.name.startswith("package-0")]
    assert len({id(zone.counter) for zone in dies}) == 2
    both_j = sum(zone.counter.power.integral(60.0) for zone in dies)
    assert both_j == pytest.approx(world.truth.packages[0].integral(60.0))


def test_module_counter_holds_the_cpu() -> None:
    """A module's counter covers GPU, CPU package and memory; power readings are for the GPU or the whole module."""
    world = EnergyWorld(2, "gh200")
    truth = world.truth
    expected_j = sum(steps[0].between(0.0, 50.0) for steps in (truth.gpus, truth.packages, truth.drams))
    assert world.gpu_counters[0].power.between(0.0, 50.0) == pytest.approx(expected_j)
    nvml = world.nvml
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    world.clock.advance_to(30.0)
    gpu, module, memory = nvml.nvmlDeviceGetFieldValues(
        handle, [(pynvml.NVML_FI_DEV_POWER_INSTANT, scope) for scope in (0, 1, 2)]
    )
    assert module.value.uiVal > gpu.value.uiVal + 10_000
    assert memory.nvmlReturn == pynvml.NVML_ERROR_NOT_SUPPORTED


def test_nvml_stand_in() -> None:
    """The fake of NVML needs ``nvmlInit``, finds GPUs by index and UUID, and raises pynvml's own errors."""
    world = EnergyWorld(0, "calm", wrappers=1)
    nvml = world.nvml
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        nvml.nvmlDeviceGetHandleByIndex(0)
    nvml.nvmlInit()
    gpu = world.machine.gpus[0]
    handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
    assert nvml.nvmlDeviceGetHandleByUUID(gpu.uuid.encode()) is handle
    assert nvml.nvmlDeviceGetUUID(handle) == gpu.uuid
    assert nvml.nvmlDeviceGetEnforcedPowerLimit(handle) == 700_000
    with pytest.raises(pynvml.NVMLError_NotFound):
        nvml.nvmlDeviceGetHandleByUUID("GPU-of-another-machine")
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        nvml.nvmlDeviceGetHandleByIndex(99)
    with pytest.raises(nvml.NVMLError) as caught:
        nvml.nvmlDeviceGetFanSpeed(handle)
    assert caught.value.value == nvml.NVML_ERROR_NOT_SUPPORTED
    [energy] = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION])
    assert energy.value.ullVal == nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    with pytest.raises(pynvml.NVMLError_LibraryNotFound):
        EnergyWorld(0, "cpu_only").nvml.nvmlInit()
    sampled = EnergyWorld(0, "sampled").nvml
    sampled.nvmlInit()
    with pytest.raises(pynvml.NVMLError_NotSupported):
        sampled.nvmlDeviceGetTotalEnergyConsumption(sampled.nvmlDeviceGetHandleByIndex(0))


def test_gpu_state_follows_the_history() -> None:
    """A GPU with an LLM lists the engine's worker and the used memory, and has a high clock under load."""
    world = EnergyWorld(4, "calm", wrappers=1)
    nvml = world.nvml
    nvml.nvmlInit()
    prompt = next(p for p in world.history.prompts if p.ran)
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    world.clock.advance_to((prompt.begin_s + prompt.end_s) / 2)
    workers = {p.pid for p in world.tree.processes if p.command == "VLLM::Worker"}
    [process] = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    assert process.pid in workers
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    assert memory.total - memory.free == memory.used > process.usedGpuMemory > 2**30
    assert nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) > 1000


def test_reload_of_the_driver_loses_the_gpu_for_a_while() -> None:
    """While the driver is being reloaded, calls raise "GPU is lost"; after that, the counter starts near zero."""
    world = first_world("h100_intel", lost=True)
    fault = next(fault for fault in world.faults if fault.kind == "lost")
    world.nvml.nvmlInit()
    handle = world.nvml.nvmlDeviceGetHandleByIndex(int(fault.counter[4:]))
    world.clock.advance_to(fault.begin_s + 0.01)
    with pytest.raises(pynvml.NVMLError_GpuIsLost):
        world.nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    world.clock.advance_to(fault.end_s)
    # At most the energy of a few seconds at the power limit; a jump may occur in these seconds.
    assert world.nvml.nvmlDeviceGetTotalEnergyConsumption(handle) % 100_000_000 < 3 * 700_000


@pytest.mark.parametrize("seed", [0, 3, 8])
def test_files_are_what_read_says(seed: int, tmp_path: Path) -> None:
    """At every poll, the written files are equal to what ``read`` returns; ended processes have no directory."""
    with EnergyWorld(seed, "h100_intel", horizon_s=60.0) as world:
        for now_s in polls(world, 0.5):
            world.write_tree(tmp_path)
            assert (tmp_path / "proc/stat").read_text() == world.read("/proc/stat")
            for zone in world.zones:
                path = f"sys/class/powercap/{zone.directory}/energy_uj"
                if zone.is_readable(now_s):
                    assert (tmp_path / path).read_text() == world.read(path)
                assert (tmp_path / path).parent.joinpath("name").read_text().strip() == zone.name
            there = {p.pid: p for p in world.tree.processes if p.begin_s <= now_s < p.gone_s}
            assert {int(path.name) for path in (tmp_path / "proc").iterdir() if path.name.isdigit()} == set(there)
            for pid in there:
                assert (tmp_path / f"proc/{pid}/stat").read_text() == world.read(f"/proc/{pid}/stat")
                assert len(world.read(f"/proc/{pid}/stat").rpartition(")")[2].split()) == 50


def test_zone_that_cannot_be_read(tmp_path: Path) -> None:
    """Reading a zone that can't be read raises OSError, from the files and from ``read``, also for root."""
    with first_world("h100_intel", unreadable=True) as world:
        fault = next(fault for fault in world.faults if fault.kind == "unreadable")
        world.write_tree(tmp_path)
        world.clock.advance_to(max(fault.begin_s, 0.0))
        world.write_tree(tmp_path)
        path = f"sys/class/powercap/{fault.counter}/energy_uj"
        with pytest.raises(OSError, match="energy_uj"):
            (tmp_path / path).read_text()
        with pytest.raises(PermissionError):
            world.read(path)
        with pytest.raises(FileNotFoundError):
            world.read("/sys/class/powercap/intel-rapl:77/energy_uj")


@given(seeds)
@some_seeds
def test_process_times_are_the_truth(seed: int) -> None:
    """The times of all processes that a wrapper ever had add up to its true CPU time, /proc/stat to the machine's."""
    world = EnergyWorld(seed)
    end_s = world.horizon_s
    for wrapper in world.machine.wrappers:
        place = world.machine.wrappers.index(wrapper) + 1
        own = [p for p in world.tree.processes if p.pid // 1000 == place]
        spent_s = sum(p.own_cpu_s(end_s) - p.earlier_cpu_s for p in own)
        assert spent_s == pytest.approx(world.truth.tree_cpus[wrapper.name].integral(end_s))
    first = [int(x) for x in world.read("/proc/stat").splitlines()[0].split()[1:]]
    world.clock.advance_to(end_s)
    last = [int(x) for x in world.read("/proc/stat").splitlines()[0].split()[1:]]
    busy_s = (last[0] + last[2] - first[0] - first[2]) / 100
    assert busy_s == pytest.approx(world.truth.busy_cpus.integral(end_s), abs=0.05)
    assert (sum(last) - sum(first)) / 100 == pytest.approx(end_s * world.machine.cpu.processors, abs=0.05)


def tree_ticks(parent: Process, now_s: float) -> int:
    """Sum the ticks of a process, of those it reaped, and of its children that can be seen."""
    seen = [p for p in parent.children if p.begin_s <= now_s < p.gone_s]
    return sum(parent.ticks(now_s)) + sum(tree_ticks(child, now_s) for child in seen)


@pytest.mark.parametrize(
    ("reaping", "torn_s"), [("at_once", 3600.0), ("zombie", 3600.0), ("twice", 7200.0), ("missing", 0.0)]
)
def test_reaping_by_hand(reaping: str, torn_s: float) -> None:
    """A child with 3,600 s of CPU time ends. 10 ms later it counts once, twice or not at all; later once."""
    child = Process(2, 1, "child", -1.0, 5.0, (), 3600.0, reaping=reaping)  # type: ignore[arg-type]
    parent = Process(1, 0, "parent", -1.0, 1e9, (), 0.0, (child,))
    assert tree_ticks(parent, 4.99) == 360_000
    assert tree_ticks(parent, 5.01) == torn_s * 100
    assert tree_ticks(parent, 6.0) == 360_000
