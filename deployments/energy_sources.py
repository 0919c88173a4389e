"""Where joules come from: NVIDIA's energy counters, the kernel's powercap zones, a model of the CPU.

`probe_sources` finds out, by real calls, what a machine has. A source that can't be read is not an error: it is
listed as `Unreadable` with the reason, so that people can see it and a figure is never made up.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pynvml

from deployments.cpu_time import TICKS_PER_S, CPUTimeTree
from deployments.energy import CPUModel, Label, SCISettings

POWERCAP_ROOT = Path("/sys/class/powercap")
POWER_HEADROOM = 1.2
"""Power above this many times the limit is no plausible reading."""
_NVML_CLOCK_SM, _NVML_CLOCK_MEM = 1, 2
"""NVML's nvmlClockType_t."""
_MAX_SAMPLE_GAP_S = 0.2
"""Longest time between two power samples that are integrated; the label promises 10 a second."""


class ReadFailed(Exception):
    """A source could not be read this time; its counter goes on counting."""


class CounterLost(Exception):
    """What the counter did since the last reading can't be told; ``flag`` says why."""

    def __init__(self, flag: str) -> None:
        super().__init__(flag)
        self.flag = flag


class Joules(NamedTuple):
    """An amount of energy; low and high differ from mid only where it is modelled."""

    low: float
    mid: float
    high: float


class Source(ABC):
    """A cumulative counter of energy, or of what energy follows from. Used by one thread at a time.

    ``name`` is that of the component, ``method`` how it is read, ``origin`` says both in words. ``max_age_s``,
    ``step`` and ``max_rate`` (units a second) are as `windows.Track` wants them; ``limit_w`` is the highest average
    power that the hardware is set to, None if not known. The units are joules unless the class says otherwise.
    """

    name: str
    method: str
    label: Label
    origin: str
    max_age_s: float | None = None
    step: float = 0.0
    limit_w: float | None = None

    @property
    def max_rate(self) -> float | None:
        """More units a second can't be."""
        return None if self.limit_w is None else POWER_HEADROOM * self.limit_w

    @abstractmethod
    def read(self, now_s: float) -> float:
        """Units since some fixed moment, never less than before unless the hardware's counter was reset.

        Raises:
            ReadFailed: Not this time.
            CounterLost: The history of the counter has a hole here; the next reading begins a new one.
        """

    def joules(self, duration_s: float, units: float) -> Joules:
        """The energy of a time in which the counter went up by so many units."""
        return Joules(units, units, units)

    def power_w(self) -> float | None:
        """Watts that the hardware tells by other means than this counter, to check it by; None if it tells none."""
        return None

    def contended(self, now_s: float) -> bool | None:
        """Whether processes that are not ours use the hardware; None: can't be told. May take milliseconds."""
        return False

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what was opened. The source is not read any more."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What was looked for and can't be read, and why. ``in_boundary``: no total is known without it."""

    name: str
    why: str
    in_boundary: bool = False


# --- GPUs: NVML --------------------------------------------------------------------------------------------


class _GPU(Source):
    """A GPU by its UUID. Each one holds NVML open until it is closed."""

    def __init__(self, uuid: str, handle: Any, tree: CPUTimeTree) -> None:
        self.name = f"gpu:{uuid}"
        self._handle = handle
        self._tree = tree
        self.limit_w = _power_limit_w(handle)

    def contended(self, now_s: float) -> bool | None:
        """Whether other compute processes run on the GPU, as far as they are of our pid namespace."""
        try:
            users = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}
        except pynvml.NVMLError:
            return None
        if users <= self._tree.pids():
            return False  # without a look at every process of the machine, which takes milliseconds
        self._tree.refresh(now_s)
        strangers = users - self._tree.pids()
        # In a container the driver tells the host's process ids: those can't be compared with ours.
        if not all(self._tree.exists(pid) for pid in strangers):
            return None
        return bool(strangers)

    def close(self) -> None:
        """Give NVML back."""
        pynvml.nvmlShutdown()


class GPUCounter(_GPU):
    """The driver's energy counter, mJ since it was loaded; steps every 20 to 100 ms.

    Source: NVML API, nvmlDeviceGetTotalEnergyConsumption (Volta or newer).
    """

    method = "nvml-energy-counter"
    label = Label.MEASURED
    origin = "NVML energy counter of the GPU and its memory"
    step = 1e-3

    def read(self, now_s: float) -> float:
        """Joules since the driver was loaded."""
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except pynvml.NVMLError as error:
            raise ReadFailed(str(error)) from error

    def power_w(self) -> float | None:
        """Watts by NVML's power reading."""
        try:
            return float(pynvml.nvmlDeviceGetPowerUsage(self._handle)) / 1000
        except pynvml.NVMLError:
            return None


class GPUPower(_GPU):
    """Power samples, integrated by the trapezoid rule, for GPUs without an energy counter.

    Source: NVML API, nvmlDeviceGetPowerUsage: mW of the GPU and its memory; the mean of the last second on Ampere
    (but GA100) and newer, so short peaks are smeared.
    """

    method = "nvml-power-samples"
    label = Label.MEASURED_SAMPLED
    origin = "NVML power samples of the GPU and its memory, integrated"
    max_age_s = 0.0

    def __init__(self, uuid: str, handle: Any, tree: CPUTimeTree) -> None:
        super().__init__(uuid, handle, tree)
        self._last: tuple[float, float] | None = None
        self._joules = 0.0

    def read(self, now_s: float) -> float:
        """Joules since the first sample."""
        try:
            power_w = float(pynvml.nvmlDeviceGetPowerUsage(self._handle)) / 1000
        except pynvml.NVMLError as error:
            raise ReadFailed(str(error)) from error
        last, self._last = self._last, (now_s, power_w)
        if last is not None:
            if now_s - last[0] > _MAX_SAMPLE_GAP_S:
                raise CounterLost("undersampled")
            self._joules += (now_s - last[0]) * (last[1] + power_w) / 2
        return self._joules


def _power_limit_w(handle: Any) -> float | None:
    try:
        return float(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)) / 1000
    except pynvml.NVMLError:
        return None


def _probe_gpu(uuid: str, tree: CPUTimeTree) -> Source | Unreadable:
    """The best that a GPU offers. MIG slices and many vGPUs offer nothing."""
    name = f"gpu:{uuid}"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Unreadable(name, f"NVML can't be used: {error}", in_boundary=True)
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        try:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            return GPUCounter(uuid, handle, tree)
        except pynvml.NVMLError as error:
            no_counter = str(error)
        try:
            pynvml.nvmlDeviceGetPowerUsage(handle)
            return GPUPower(uuid, handle, tree)
        except pynvml.NVMLError as error:
            why = f"no energy counter ({no_counter}) and no power reading ({error})"
    except pynvml.NVMLError as error:
        why = f"no such GPU: {error}"
    pynvml.nvmlShutdown()
    return Unreadable(name, why, in_boundary=True)


def gpu_uuids(visible_devices: str) -> tuple[str, ...]:
    """The UUIDs of the GPUs that a CUDA_VISIBLE_DEVICES names, by UUID or by NVML's index, as Ray writes it.

    Raises:
        ReadFailed: NVML can't be used or knows no such index.
    """
    names = [name.strip() for name in visible_devices.split(",") if name.strip()]
    if not any(name.isdigit() for name in names):
        return tuple(names)
    try:
        pynvml.nvmlInit()
        try:
            return tuple(
                str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(int(name)))) if name.isdigit() else name
                for name in names
            )
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise ReadFailed(f"CUDA_VISIBLE_DEVICES={visible_devices}: {error}") from error


def gpu_memory(visible_devices: str) -> Mapping[str, tuple[int, int]]:
    """Bytes in use, and all there are, of the GPUs that a CUDA_VISIBLE_DEVICES names, by UUID.

    Source: NVML API, nvmlDeviceGetMemoryInfo: ``total`` is the physical memory, what the driver keeps included.

    Raises:
        ReadFailed: NVML can't be used, or does not tell of all of them.
    """
    uuids = gpu_uuids(visible_devices)
    try:
        pynvml.nvmlInit()
        try:
            infos = {uuid: pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in uuids}
            return {uuid: (int(info.used), int(info.total)) for uuid, info in infos.items()}
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise ReadFailed(f"CUDA_VISIBLE_DEVICES={visible_devices}: {error}") from error


def gpu_settings(visible_devices: str) -> list[dict[str, Any]]:
    """How the GPUs that a CUDA_VISIBLE_DEVICES names are set, in its order: power limit [W] and clocks [MHz].

    What a GPU does not tell is None.

    Source: NVML API, nvmlDeviceGetName, nvmlDeviceGetClockInfo, nvmlDeviceGetMaxClockInfo.

    Raises:
        ReadFailed: NVML can't be used, or does not know one of them.
    """
    uuids = gpu_uuids(visible_devices)
    try:
        pynvml.nvmlInit()
        try:
            return [_settings_of(uuid, pynvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in uuids]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise ReadFailed(f"CUDA_VISIBLE_DEVICES={visible_devices}: {error}") from error


def _settings_of(uuid: str, handle: Any) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "name": str(pynvml.nvmlDeviceGetName(handle)),
        "power_limit_w": _power_limit_w(handle),
        "clocks_mhz": _clocks_mhz(handle, pynvml.nvmlDeviceGetClockInfo),
        "max_clocks_mhz": _clocks_mhz(handle, pynvml.nvmlDeviceGetMaxClockInfo),
    }


def _clocks_mhz(handle: Any, read: Callable[[Any, int], int]) -> dict[str, int | None]:
    clocks: dict[str, int | None] = {}
    for name, clock in (("sm", _NVML_CLOCK_SM), ("memory", _NVML_CLOCK_MEM)):
        try:
            clocks[name] = int(read(handle, clock))
        except pynvml.NVMLError:
            clocks[name] = None
    return clocks


def driver_version() -> str:
    """Version of the GPUs' driver.

    Source: NVML API, nvmlSystemGetDriverVersion.

    Raises:
        ReadFailed: NVML can't be used.
    """
    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise ReadFailed(str(error)) from error


# --- CPU and memory: powercap ------------------------------------------------------------------------------


class PowercapZone(Source):
    """A package or dram zone of Intel's or AMD's RAPL, µJ, wrapping at max_energy_range_uj; steps every ~1 ms.

    Source: Linux, Documentation/power/powercap; Intel SDM 3B, 14.10 (counters are updated every ~1 ms).
    """

    method = "powercap"
    label = Label.MEASURED
    max_age_s = 2e-3
    step = 1e-3

    def __init__(self, name: str, zone: Path) -> None:
        """Raises OSError or ValueError when the zone can't be read."""
        self.name = name
        self.origin = f"powercap energy counter {zone.name} of the whole machine"
        self._path = str(zone / "energy_uj")
        self._range_uj = int((zone / "max_energy_range_uj").read_text())
        self._total_uj = 0
        self._last_s: float | None = None
        self._last_uj = int((zone / "energy_uj").read_text())
        self.limit_w = _zone_limit_w(zone)

    def read(self, now_s: float) -> float:
        """Joules since the first reading, over all wraps."""
        try:
            now_uj = _read_int(self._path)
        except (OSError, ValueError) as error:
            raise ReadFailed(str(error)) from error
        last_s, last_uj = self._last_s, self._last_uj
        self._last_s, self._last_uj = now_s, now_uj
        if last_s is None:
            return self._total_uj / 1e6
        if self.max_rate is not None and (now_s - last_s) * self.max_rate * 1e6 >= self._range_uj:
            raise CounterLost("poll_gap")  # it may have wrapped more than once
        delta_uj = (now_uj - last_uj) % self._range_uj
        if delta_uj > self._range_uj // 2:
            raise CounterLost("counter_reset")  # backwards, and not by wrapping
        self._total_uj += delta_uj
        return self._total_uj / 1e6


def _read_int(path: str) -> int:
    """A file of one number. A third of what Path.read_text takes, 20 times a second."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return int(os.read(fd, 32))
    finally:
        os.close(fd)


def _zone_limit_w(zone: Path) -> float | None:
    """The highest of a zone's power limits (long and short term, and the maximum); None where it tells none."""
    limits = []
    for path in (*zone.glob("constraint_*_power_limit_uw"), *zone.glob("constraint_*_max_power_uw")):
        try:
            limits.append(int(path.read_text()) / 1e6)
        except (OSError, ValueError):
            continue  # zones list constraints that they don't support
    return max((limit for limit in limits if limit > 0), default=None)


def _probe_powercap(root: Path) -> list[Source | Unreadable]:
    """All packages and all memory zones, or the reasons. A kind with an unreadable zone is left out altogether."""
    if not root.is_dir():
        return [Unreadable("powercap", f"{root} does not exist")]
    found: dict[str, list[Source | Unreadable]] = {"package": [], "dram": []}
    for zone in sorted(root.glob("intel-rapl:*")):
        name = zone.name
        try:
            name = (zone / "name").read_text().strip()
            kind = name.split("-")[0]
            if kind == "dram":
                name = f"dram-{zone.name.split(':')[1]}"
            if kind in found:
                found[kind].append(PowercapZone(name, zone))
        except (OSError, ValueError) as error:
            found.setdefault(name.split("-")[0], []).append(Unreadable(name, str(error)))
    sources: list[Source | Unreadable] = []
    for kind, zones in found.items():
        broken = [zone for zone in zones if isinstance(zone, Unreadable)]
        sources.extend(broken or zones or [Unreadable(kind, f"no such zone in {root}")])
    return sources


# --- CPU: a model ------------------------------------------------------------------------------------------


class CPUModelSource(Source):
    """The CPU's energy estimated from the CPU time of our processes; its units are CPU-seconds.

    Idle watts of all the CPUs we have reserved, for all of the time, and (busy - idle) watts for every CPU-second.
    """

    name = "cpu-model"
    method = "cpu-model"
    label = Label.MODELED
    max_age_s = step = 1 / TICKS_PER_S

    def __init__(self, model: CPUModel, tree: CPUTimeTree, *, cpus: float) -> None:
        self.origin = f"estimate from the CPU time of our processes and {cpus:g} reserved CPUs; watts: {model.source}"
        self._model = model
        self._tree = tree
        self._cpus = cpus

    @property
    def max_rate(self) -> float:
        """No more CPU-seconds a second than there are CPUs."""
        return self._cpus

    def read(self, now_s: float) -> float:
        """CPU-seconds since the first reading."""
        try:
            return self._tree.read_s(now_s)
        except (OSError, ValueError) as error:
            raise ReadFailed(str(error)) from error

    def joules(self, duration_s: float, units: float) -> Joules:
        """The modelled energy, with the range of the estimate."""
        model = self._model
        active_w_per_cpu = model.busy_w_per_cpu - model.idle_w_per_cpu
        mid = model.idle_w_per_cpu * self._cpus * duration_s + active_w_per_cpu * units
        return Joules(mid * model.low_factor, mid, mid * model.high_factor)


def probe_sources(
    gpu_uuids: Sequence[str],
    *,
    pid: int,
    settings: SCISettings,
    powercap_root: Path = POWERCAP_ROOT,
    proc_root: Path = Path("/proc"),
    cpus: float | None = None,
) -> list[Source | Unreadable]:
    """What there is to count the energy of these GPUs and of this machine's CPUs, each tried by a real call.

    A GPU that can't be read is inside the boundary all the same, so that no total is known without it. The CPU is
    counted by hardware where it can be, else by the operator's model; but where GPUs are measured and estimates are
    not allowed it is left out, because a sum with an estimate is one: the figure is then measured, and flagged
    ``cpu_not_covered``.

    Args:
        gpu_uuids: The wrapper's GPUs, empty for none.
        pid: The process whose tree does the work.
        settings: The operator's choices; the CPU model is taken from them.
        powercap_root: Where the kernel shows its powercap zones.
        proc_root: Where proc is mounted.
        cpus: How many CPUs are reserved, for the model; None: all that this process may run on.
    """
    tree = CPUTimeTree(pid, proc_root=proc_root)
    gpus = [_probe_gpu(uuid, tree) for uuid in gpu_uuids]
    found = [*gpus, *_probe_powercap(powercap_root)]
    if any(isinstance(source, PowercapZone) and source.name.startswith("package-") for source in found):
        return found
    if settings.cpu_model is None:
        found.append(Unreadable("cpu-model", "the settings hold no energy.cpu_model"))
    elif gpus and not settings.allow_estimates:
        found.append(Unreadable("cpu-model", "energy.allow_estimates is false, and GPUs are counted without it"))
    else:
        reserved = float(len(os.sched_getaffinity(0))) if cpus is None else cpus
        found.append(CPUModelSource(settings.cpu_model, tree, cpus=reserved))
    return found
