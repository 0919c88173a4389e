from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest

from deployments.energy.counters.probe import (
    CounterLost,
    CPUModelSource,
    GPUCounter,
    GPUPower,
    PowercapZone,
    Source,
    Unreadable,
    probe_sources,
)
from deployments.energy.figures import CPUModel, SCISettings
from deployments.machine.cpu_time import CPUTimeTree
from deployments.machine.gpus import ReadFailed, gpu_uuids
from registry.errors import BadSettings
from registry.settings import load_settings
from registry.wire.labels import Label
from tests.support.fake_counters import (
    OTHER_UUID,
    UUID,
    FakeGPU,
    FakeNVML,
    install_nvml,
    set_energy,
    write_process,
    write_zone,
)

MODEL = CPUModel(0.5, 4.0, 0.25, 1.0, 2.0, 8.0, "a data sheet")
ME = 4242


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    root = tmp_path / "proc"
    write_process(root, ME, 1)
    write_process(root, 1, 0)
    return root


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    return tmp_path / "powercap"


Probe = Callable[..., list[Source | Unreadable]]


@pytest.fixture
def probe(proc: Path, powercap: Path) -> Probe:
    def run(*uuids: str, allow_estimates: bool = True, cpu_model: CPUModel | None = None) -> list[Source | Unreadable]:
        settings = SCISettings(1.0, "output_token", allow_estimates, None, cpu_model)
        return probe_sources(uuids, pid=ME, settings=settings, powercap_root=powercap, proc_root=proc, cpus=4)

    return run


def gpu_source(found: list[Source | Unreadable]) -> Source | Unreadable:
    source, *_ = [source for source in found if source.name.startswith("gpu:")]
    return source


# --- GPUs ------------------------------------------------------------------------------------------------------


def test_gpu_energy_counter(monkeypatch: pytest.MonkeyPatch, probe: Probe) -> None:
    """A GPU with an energy counter is read by it, in joules, and labelled measured."""
    gpu = FakeGPU()
    install_nvml(monkeypatch, FakeNVML(FakeGPU(OTHER_UUID), gpu))
    source = gpu_source(probe(UUID))
    assert isinstance(source, GPUCounter)
    assert source.power_w() == 300.0
    assert (source.name, source.label, source.limit_w) == (f"gpu:{UUID}", Label.MEASURED, 700.0)
    gpu.energy_mj = 5_000_250
    assert source.read(0.0) == pytest.approx(5000.25)


@pytest.mark.parametrize("missing", [(), ("nvmlDeviceGetTotalEnergyConsumption",)])
def test_gpu_without_counter_is_sampled(
    monkeypatch: pytest.MonkeyPatch, probe: Probe, missing: tuple[str, ...]
) -> None:
    """Where the counter is unsupported, or unknown to the driver, power samples are integrated and labelled so."""
    gpu = FakeGPU()
    if not missing:
        gpu.energy_mj = None
    install_nvml(monkeypatch, FakeNVML(gpu, missing=missing))
    source = gpu_source(probe(UUID))
    assert isinstance(source, GPUPower)
    assert source.label is Label.MEASURED_SAMPLED
    assert source.read(10.0) == 0.0
    gpu.power_mw = 500_000
    assert source.read(10.1) == pytest.approx(0.1 * 400)
    assert source.read(10.2) == pytest.approx(0.1 * 400 + 0.1 * 500)


def test_sampling_gap_is_a_hole(monkeypatch: pytest.MonkeyPatch, probe: Probe) -> None:
    """Power is not integrated over a gap that is too long for ten samples a second; sampling goes on after it."""
    gpu = FakeGPU()
    gpu.energy_mj = None
    install_nvml(monkeypatch, FakeNVML(gpu))
    source = gpu_source(probe(UUID))
    assert isinstance(source, GPUPower)
    source.read(10.0)
    with pytest.raises(CounterLost, match="undersampled"):
        source.read(10.5)
    assert source.read(10.6) == pytest.approx(0.1 * 300)


def test_gpu_that_offers_nothing(monkeypatch: pytest.MonkeyPatch, probe: Probe) -> None:
    """A GPU without counter and power reading (vGPU) is listed with both reasons, inside the boundary."""
    gpu = FakeGPU()
    gpu.energy_mj = gpu.power_mw = None
    nvml = install_nvml(monkeypatch, FakeNVML(gpu))
    source = gpu_source(probe(UUID))
    assert isinstance(source, Unreadable)
    assert source.in_boundary
    assert "no energy counter (Not Supported)" in source.why
    assert "no power reading (Not Supported)" in source.why
    assert nvml.opened == 0


@pytest.mark.parametrize("uuid", ["MIG-4e4b1c5a-0000-4000-8000-000000000003", "MIG-GPU-4e4b1c5a/1/0"])
def test_slice_of_a_gpu_is_not_charged_the_whole(monkeypatch: pytest.MonkeyPatch, probe: Probe, uuid: str) -> None:
    """Two wrappers on slices of a GPU of 400 W, which a driver tells of each: 1,600 J in 2 s of 800 J. None is told."""
    gpu = FakeGPU(uuid)
    gpu.power_mw = gpu.instant_mw = 400_000
    nvml = install_nvml(monkeypatch, FakeNVML(gpu))
    source = gpu_source(probe(uuid))
    assert isinstance(source, Unreadable)
    assert source.in_boundary
    assert "MIG" in source.why
    assert nvml.opened == 0


def test_unknown_gpu(monkeypatch: pytest.MonkeyPatch, probe: Probe) -> None:
    """A UUID that NVML does not know is told as such."""
    nvml = install_nvml(monkeypatch, FakeNVML(FakeGPU(OTHER_UUID)))
    source = gpu_source(probe(UUID))
    assert isinstance(source, Unreadable)
    assert "no such GPU: Not Found" in source.why
    assert nvml.opened == 0


def test_no_nvml_library(monkeypatch: pytest.MonkeyPatch, probe: Probe) -> None:
    """Without the driver's library every GPU is listed as unreadable; nothing is raised, nothing is 0."""
    install_nvml(monkeypatch, FakeNVML(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    found = [source for source in probe(UUID, OTHER_UUID) if source.name.startswith("gpu:")]
    assert [source.name for source in found] == [f"gpu:{UUID}", f"gpu:{OTHER_UUID}"]
    assert all(isinstance(source, Unreadable) and source.in_boundary for source in found)
    assert all("NVML Shared Library Not Found" in getattr(source, "why", "") for source in found)


def test_real_nvml_is_asked(probe: Probe) -> None:
    """The installed pynvml has every function that is used; here it is asked for a GPU that no machine has."""
    source = gpu_source(probe("GPU-00000000-0000-0000-0000-000000000000"))
    assert isinstance(source, Unreadable)
    for function in [name for name in dir(FakeNVML) if name.startswith("nvml")]:
        assert callable(getattr(pynvml, function))


def test_failed_reading_is_told(monkeypatch: pytest.MonkeyPatch, probe: Probe) -> None:
    """An NVML error while reading is a failed reading with NVML's own words, for counters and samples alike."""
    counted, sampled = FakeGPU(), FakeGPU(OTHER_UUID)
    sampled.energy_mj = None
    install_nvml(monkeypatch, FakeNVML(counted, sampled))
    sources = [source for source in probe(UUID, OTHER_UUID) if isinstance(source, GPUCounter | GPUPower)]
    counted.error = sampled.error = pynvml.NVML_ERROR_GPU_IS_LOST
    assert len(sources) == 2
    for source in sources:
        with pytest.raises(ReadFailed, match="GPU is lost"):
            source.read(0.0)


def test_limit_may_be_unknown(monkeypatch: pytest.MonkeyPatch, probe: Probe) -> None:
    """A GPU that does not tell its power limit is counted all the same; 3 kW, more than any takes, bounds its steps."""
    gpu = FakeGPU()
    gpu.limit_mw = None
    install_nvml(monkeypatch, FakeNVML(gpu))
    source = gpu_source(probe(UUID))
    assert isinstance(source, GPUCounter)
    assert source.limit_w is None
    assert source.max_rate == pytest.approx(1.2 * 3000)


def test_nvml_is_given_back(monkeypatch: pytest.MonkeyPatch, probe: Probe) -> None:
    """NVML is closed as often as it was opened."""
    nvml = install_nvml(monkeypatch, FakeNVML(FakeGPU(), FakeGPU(OTHER_UUID)))
    sources = [source for source in probe(UUID, OTHER_UUID) if isinstance(source, Source)]
    assert nvml.opened == 2
    for source in sources:
        source.close()
    assert nvml.opened == 0


@pytest.mark.parametrize(
    ("pids", "contended"),
    [
        ([], False),
        ([ME], False),
        ([ME, 4300], False),
        ([ME, 77], True),
        ([987_654], None),
        (None, None),
    ],
)
def test_contention(
    monkeypatch: pytest.MonkeyPatch, probe: Probe, proc: Path, pids: list[int] | None, contended: bool | None
) -> None:
    """Processes of others on the GPU are seen; ours and our children's are not others; what can't be told is None."""
    write_process(proc, 4300, ME)
    write_process(proc, 77, 1)
    gpu = FakeGPU()
    gpu.pids = pids
    install_nvml(monkeypatch, FakeNVML(gpu))
    source = gpu_source(probe(UUID))
    assert isinstance(source, Source)
    assert source.contended(0.0) is contended


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [("", ()), (UUID, (UUID,)), ("1", (OTHER_UUID,)), ("1, 0", (OTHER_UUID, UUID)), ("MIG-1", ("MIG-1",))],
)
def test_visible_devices_to_uuids(monkeypatch: pytest.MonkeyPatch, visible: str, uuids: tuple[str, ...]) -> None:
    """CUDA_VISIBLE_DEVICES becomes UUIDs, whether it names GPUs by UUID or by index."""
    nvml = install_nvml(monkeypatch, FakeNVML(FakeGPU(UUID), FakeGPU(OTHER_UUID)))
    assert gpu_uuids(visible) == uuids
    assert nvml.opened == 0


def test_visible_devices_unknown_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that NVML does not know is an error that names it."""
    install_nvml(monkeypatch, FakeNVML(FakeGPU()))
    with pytest.raises(ReadFailed, match="CUDA_VISIBLE_DEVICES=3"):
        gpu_uuids("3")


# --- powercap --------------------------------------------------------------------------------------------------


def zones(found: list[Source | Unreadable]) -> list[str]:
    return [source.name for source in found if isinstance(source, PowercapZone)]


def test_packages_and_memory_only(probe: Probe, powercap: Path) -> None:
    """Of all zones, packages and memory are counted, each once; parts of packages, psys and the mmio twins are not."""
    write_zone(powercap, "intel-rapl:0", "package-0")
    write_zone(powercap, "intel-rapl:0:0", "core")
    write_zone(powercap, "intel-rapl:0:1", "uncore")
    write_zone(powercap, "intel-rapl:0:2", "dram")
    write_zone(powercap, "intel-rapl:1", "package-1")
    write_zone(powercap, "intel-rapl:1:0", "dram")
    write_zone(powercap, "intel-rapl:2", "psys")
    write_zone(powercap, "intel-rapl-mmio:0", "package-0")
    assert zones(probe()) == ["package-0", "package-1", "dram-0", "dram-1"]


def zone_source(probe: Probe, name: str = "package-0") -> PowercapZone:
    [source] = [source for source in probe() if source.name == name]
    assert isinstance(source, PowercapZone)
    return source


def test_zone_counts_joules_over_a_wrap(probe: Probe, powercap: Path) -> None:
    """A zone that wraps at its range goes on counting."""
    zone = write_zone(powercap, "intel-rapl:0", "package-0", energy_uj=99_000_000, range_uj=100_000_000)
    source = zone_source(probe)
    assert source.read(0.0) == 0.0
    set_energy(zone, 99_500_000)
    assert source.read(0.05) == pytest.approx(0.5)
    set_energy(zone, 300_000)
    assert source.read(0.10) == pytest.approx(1.3)


def test_zone_reset_is_not_a_wrap(probe: Probe, powercap: Path) -> None:
    """A zone that falls by less than wrapping explains has been reset, and nothing is made up for that time."""
    zone = write_zone(powercap, "intel-rapl:0", "package-0", energy_uj=30_000_000, range_uj=100_000_000)
    source = zone_source(probe)
    source.read(0.0)
    set_energy(zone, 1_000_000)
    with pytest.raises(CounterLost, match="counter_reset"):
        source.read(0.05)
    set_energy(zone, 2_000_000)
    assert source.read(0.10) == pytest.approx(1.0)


def test_zone_gap_with_room_for_a_lap(probe: Probe, powercap: Path) -> None:
    """After a pause in which a zone may have wrapped unseen its reading is not believed."""
    zone = write_zone(
        powercap, "intel-rapl:0", "package-0", energy_uj=0, range_uj=100_000_000, limits_uw=[80_000_000, 100_000_000]
    )
    source = zone_source(probe)
    assert source.limit_w == 100.0
    source.read(0.0)
    set_energy(zone, 1_000_000)
    with pytest.raises(CounterLost, match="poll_gap"):
        source.read(1.0)


@pytest.mark.parametrize("limits", [(), (0,)])
def test_zone_without_limit(probe: Probe, powercap: Path, limits: tuple[int, ...]) -> None:
    """No limit, or one of zero, is no limit."""
    write_zone(powercap, "intel-rapl:0", "package-0", limits_uw=limits)
    assert zone_source(probe).limit_w is None


def test_zone_limit_that_cannot_be_read(probe: Probe, powercap: Path) -> None:
    """A constraint that the kernel lists but refuses to show does not hide the others."""
    zone = write_zone(powercap, "intel-rapl:0", "package-0", limits_uw=[95_000_000])
    (zone / "constraint_1_max_power_uw").mkdir()
    assert zone_source(probe).limit_w == 95.0


def test_permission_denied_is_told(monkeypatch: pytest.MonkeyPatch, probe: Probe, powercap: Path) -> None:
    """A zone that only root may read is listed with the reason; the model takes the CPU's place."""
    write_zone(powercap, "intel-rapl:0", "package-0")
    read_text = Path.read_text

    def denied(path: Path, *args: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", denied)
    found = probe(cpu_model=MODEL)
    assert any(isinstance(s, Unreadable) and s.name == "package-0" and "Permission denied" in s.why for s in found)
    assert not any(isinstance(s, Unreadable) and s.in_boundary for s in found)
    assert any(isinstance(s, CPUModelSource) for s in found)


def test_half_the_packages_are_none(probe: Probe, powercap: Path) -> None:
    """If one package can't be read the others are not passed off as the CPU."""
    write_zone(powercap, "intel-rapl:0", "package-0")
    (write_zone(powercap, "intel-rapl:1", "package-1") / "max_energy_range_uj").unlink()
    write_zone(powercap, "intel-rapl:0:0", "dram")
    found = probe()
    assert zones(found) == ["dram-0"]
    assert any(isinstance(s, Unreadable) and s.name == "package-1" and "No such file" in s.why for s in found)


def test_memory_is_not_counted_beside_a_model_that_has_it(probe: Probe, powercap: Path) -> None:
    """Packages can't be read, so the CPU is estimated with its memory: its own counter would count that twice."""
    (write_zone(powercap, "intel-rapl:0", "package-0") / "max_energy_range_uj").unlink()
    write_zone(powercap, "intel-rapl:0:0", "dram")
    found = probe(cpu_model=MODEL)
    assert [s.name for s in found if isinstance(s, Source)] == ["cpu-model"]
    assert any(isinstance(s, Unreadable) and s.name == "dram-0" and "has the memory in it" in s.why for s in found)


def test_zone_that_fails_later(probe: Probe, powercap: Path) -> None:
    """A zone that vanishes or talks nonsense is a failed reading."""
    zone = write_zone(powercap, "intel-rapl:0", "package-0")
    source = zone_source(probe)
    (zone / "energy_uj").write_text("")
    with pytest.raises(ReadFailed):
        source.read(0.0)
    (zone / "energy_uj").unlink()
    with pytest.raises(ReadFailed, match="No such file"):
        source.read(0.0)


def test_nameless_zone_is_listed(probe: Probe, powercap: Path) -> None:
    """A zone without a name is listed as unreadable and stops nobody."""
    (write_zone(powercap, "intel-rapl:0", "package-0") / "name").unlink()
    write_zone(powercap, "intel-rapl:1", "package-1")
    found = probe()
    assert zones(found) == ["package-1"]
    assert any(isinstance(s, Unreadable) and s.name == "intel-rapl:0" for s in found)


def test_no_powercap_at_all(probe: Probe) -> None:
    """A machine without powercap says so."""
    assert any(isinstance(s, Unreadable) and "does not exist" in s.why for s in probe())


# --- the model of the CPU --------------------------------------------------------------------------------------


def test_model_is_idle_share_plus_cpu_time(probe: Probe) -> None:
    """The model charges idle watts for all reserved CPUs all the time, and the rest for CPU time; with its range."""
    [source] = [s for s in probe(cpu_model=MODEL) if isinstance(s, CPUModelSource)]
    low, mid, high = source.joules(10.0, 6.0)
    assert mid == pytest.approx(0.5 * 4 * 10 + (4.0 - 0.5) * 6)
    assert low == pytest.approx(mid * 0.5)
    assert high == pytest.approx(mid * 2)
    assert source.label is Label.MODELED
    assert "a data sheet" in source.origin


def test_model_of_more_cpus_than_are_reserved(probe: Probe) -> None:
    """4 CPUs are reserved and 8 are used for 10 s; 1 to 9 W idle, 10 W busy. Idle time is 40 - 80 = -40 CPU-seconds.

    So 800 J - 40 s of idle power: 440 J with 9 W, 600 J with 5 W, 760 J with 1 W.
    """
    model = CPUModel(5.0, 10.0, 1.0, 9.0, 10.0, 10.0, "a data sheet")
    [source] = [s for s in probe(cpu_model=model) if isinstance(s, CPUModelSource)]
    assert source.joules(10.0, 80.0) == pytest.approx((440.0, 600.0, 760.0))
    unlike = CPUModel(5.0, 10.0, 1.0, 9.0, 2.0, 10.0, "a data sheet")
    [source] = [s for s in probe(cpu_model=unlike) if isinstance(s, CPUModelSource)]
    assert source.joules(10.0, 80.0).low == 0.0


def test_model_reads_the_process_tree(probe: Probe, proc: Path) -> None:
    """The model's units are the CPU-seconds of the wrapper's processes."""
    [source] = [s for s in probe(cpu_model=MODEL) if isinstance(s, CPUModelSource)]
    assert source.read(0.0) == 0.0
    write_process(proc, ME, 1, ticks=(os.sysconf("SC_CLK_TCK"), 0, 0, 0))
    assert source.read(0.05) == 1.0


def test_no_coefficients_no_model(probe: Probe) -> None:
    """Without the operator's watts nothing is estimated, and it says why."""
    found = probe()
    assert not any(isinstance(s, Source) for s in found)
    assert any(isinstance(s, Unreadable) and s.name == "cpu-model" and "energy.cpu_model" in s.why for s in found)


def test_counters_beat_the_model(probe: Probe, powercap: Path) -> None:
    """Where packages are counted the CPU is not estimated on top."""
    write_zone(powercap, "intel-rapl:0", "package-0")
    assert not any(s.name == "cpu-model" for s in probe(cpu_model=MODEL))


def test_estimate_does_not_spoil_a_measurement(monkeypatch: pytest.MonkeyPatch, probe: Probe) -> None:
    """Where estimates are not allowed, measured GPUs stay measured: the CPU is left out, and it says why."""
    install_nvml(monkeypatch, FakeNVML(FakeGPU()))
    found = probe(UUID, cpu_model=MODEL, allow_estimates=False)
    assert not any(isinstance(s, CPUModelSource) for s in found)
    assert any(isinstance(s, Unreadable) and s.name == "cpu-model" and "allow_estimates" in s.why for s in found)
    assert any(isinstance(s, CPUModelSource) for s in probe(UUID, cpu_model=MODEL, allow_estimates=True))
    assert any(isinstance(s, CPUModelSource) for s in probe(cpu_model=MODEL, allow_estimates=False))


@pytest.mark.parametrize(
    "figures",
    [
        (1, 2, -1, 1, 2, 2),
        (2, 1, 2, 2, 1, 1),
        (0, 0, 0, 0, 0, 0),
        (1, 2, 1.1, 1, 2, 2),
        (1, 2, 1, 0.9, 2, 2),
        (1, 2, 1, 1, 2.1, 3),
        (1, 2, 1, 3, 2, 2.5),
    ],
)
def test_impossible_coefficients(figures: tuple[float, ...]) -> None:
    """Watts that can't be, are not in order, or are more when idle than when busy are refused as bad settings."""
    with pytest.raises(BadSettings, match=r"energy\.cpu_model"):
        CPUModel(*figures, "nowhere")  # type: ignore[arg-type, call-arg]


def test_range_of_the_model_is_that_of_its_source(tmp_path: Path) -> None:
    """configs/local.yaml: processors take 0.46 to 3.68 W idle and 1.69 to 8.96 W busy, per CPU.

    4 CPUs idle for 10 s are 18.4 to 147.2 J around 29.6 J (two factors on 0.74 W reached 74 J only); with one of them
    busy it is 30.7 to 200 J around 57.2 J.
    """
    settings = load_settings(Path("configs/local.yaml")).energy.cpu_model
    assert settings is not None
    source = CPUModelSource(CPUModel(**settings.model_dump()), CPUTimeTree(1, proc_root=tmp_path), cpus=4)
    assert source.joules(10.0, 0.0) == pytest.approx((18.4, 29.6, 147.2))
    assert source.joules(10.0, 10.0) == pytest.approx((30.7, 57.2, 200.0))


def test_whatever_this_machine_has(tmp_path: Path) -> None:
    """On the machine of the test probing raises nothing and finds something or says why not."""
    settings = SCISettings(1.0, "output_token", allow_estimates=True, cpu_model=MODEL)
    found = probe_sources([], pid=os.getpid(), settings=settings)
    assert any(isinstance(source, Source) for source in found)
    assert json.dumps([source.why for source in found if isinstance(source, Unreadable)])
