"""Fakes of the hardware that counts energy: NVML, a powercap tree, a proc tree, plain counters; and a manual clock.

They have the difficult properties of real counters: these change at times of their own, overflow, stop and fail.
"""

# ruff: noqa: N802 - pynvml's names are camel case

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from deployments.energy.counters import nvml as gpu_counters
from deployments.energy.counters.probe import Source
from deployments.machine import gpus as gpu_info
from registry.wire.labels import Label

UUID = "GPU-4e4b1c5a-0000-4000-8000-000000000001"
OTHER_UUID = "GPU-4e4b1c5a-0000-4000-8000-000000000002"


class ManualClock:
    """A clock that moves only if a test moves it."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class PowerCurve:
    """Power that changes in steps; energy is its exact integral."""

    def __init__(self, start_s: float, steps: Sequence[tuple[float, float]]) -> None:
        """``steps``: (duration in seconds, watts). The last power has no end."""
        self._times = [start_s]
        self._watts = [watts for _, watts in steps]
        self._joules = [0.0]
        for seconds, watts in steps:
            self._times.append(self._times[-1] + seconds)
            self._joules.append(self._joules[-1] + seconds * watts)

    def joules(self, time_s: float) -> float:
        step = max(min(bisect_right(self._times, time_s) - 1, len(self._watts) - 1), 0)
        return self._joules[step] + (time_s - self._times[step]) * self._watts[step]


class Ticks:
    """A growing quantity, read as it was at the last tick and rounded down to a step, as in hardware counters."""

    def __init__(self, true: Callable[[float], float], ticks_s: Sequence[float], step: float) -> None:
        self._true, self._ticks_s, self._step = true, ticks_s, step

    def __call__(self, now_s: float) -> float:
        tick_s = self._ticks_s[max(bisect_right(self._ticks_s, now_s) - 1, 0)]
        return math.floor(self._true(tick_s) / self._step) * self._step


class FakeCounter(Source):
    """A counter whose reading is the current result of ``value``. If that is an exception, it is raised."""

    method = "fake"
    origin = "a test"

    def __init__(
        self,
        value: Callable[[float], float | Exception],
        *,
        name: str = "package-0",
        label: Label = Label.MEASURED,
        max_age_s: float | None = 0.0,
        limit_w: float | None = None,
        step: float = 0.0,
    ) -> None:
        self.name, self.label, self.max_age_s, self.limit_w, self.step = name, label, max_age_s, limit_w, step
        self.value = value
        self.others: bool | None = False
        self.closed = 0

    def read(self, now_s: float) -> float:
        value = self.value(now_s)
        if isinstance(value, Exception):
            raise value
        return value

    def contended(self, now_s: float) -> bool | None:
        return self.others

    def close(self) -> None:
        self.closed += 1


class FakeGPU:
    """A GPU of FakeNVML. An attribute is None if the driver does not support it, and an NVML error code if it fails."""

    def __init__(self, uuid: str = UUID) -> None:
        self.uuid = uuid
        self.energy_mj: int | None = 5_000_000
        self.power_mw: int | None = 300_000
        self.instant_mw: int | None = None
        self.module_mw: int | None = None
        self.limit_mw: int | None = 700_000
        self.memory_bytes: int | None = 80 * 2**30
        self.pids: list[int] | None = []
        self.used_bytes: int | None = 500 * 2**20
        self.name = "NVIDIA H100 80GB HBM3"
        self.clocks_mhz: dict[int, int] | None = {1: 345, 2: 2619}
        self.max_clocks_mhz: dict[int, int] = {1: 1980, 2: 2619}
        self.error: int | None = None


class FakeNVML:
    """The functions of pynvml that the project uses, with pynvml's own errors. Counts calls of ``nvmlInit``."""

    NVMLError = pynvml.NVMLError
    NVML_SUCCESS = pynvml.NVML_SUCCESS
    NVML_FI_DEV_POWER_AVERAGE = pynvml.NVML_FI_DEV_POWER_AVERAGE
    NVML_FI_DEV_POWER_INSTANT = pynvml.NVML_FI_DEV_POWER_INSTANT
    NVML_POWER_SCOPE_GPU = pynvml.NVML_POWER_SCOPE_GPU
    NVML_POWER_SCOPE_MODULE = pynvml.NVML_POWER_SCOPE_MODULE

    def __init__(self, *gpus: FakeGPU, init_error: int | None = None, missing: Sequence[str] = ()) -> None:
        self._gpus = gpus
        self._init_error = init_error
        self._missing = missing
        self.opened = 0

    def _raise(self, code: int) -> None:
        raise pynvml.NVMLError(code)

    def _value(self, function: str, gpu: FakeGPU, value: int | None) -> int:
        if self.opened == 0:
            self._raise(pynvml.NVML_ERROR_UNINITIALIZED)
        if function in self._missing:
            self._raise(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        if gpu.error is not None:
            self._raise(gpu.error)
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def nvmlInit(self) -> None:
        if self._init_error is not None:
            self._raise(self._init_error)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        assert self.opened > 0
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        if self.opened == 0:
            self._raise(pynvml.NVML_ERROR_UNINITIALIZED)
        return "610.43.02"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGPU:
        found = [gpu for gpu in self._gpus if gpu.uuid == uuid]
        if not found:
            self._raise(pynvml.NVML_ERROR_NOT_FOUND)
        return found[0]

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGPU:
        if index >= len(self._gpus):
            self._raise(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._gpus[index]

    def nvmlDeviceGetCount(self) -> int:
        if "nvmlDeviceGetCount" in self._missing:
            self._raise(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return len(self._gpus)

    def nvmlDeviceGetUUID(self, gpu: FakeGPU) -> str:
        return gpu.uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: FakeGPU) -> int:
        return self._value("nvmlDeviceGetTotalEnergyConsumption", gpu, gpu.energy_mj)

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGPU) -> int:
        return self._value("nvmlDeviceGetPowerUsage", gpu, gpu.power_mw)

    def nvmlDeviceGetFieldValues(self, gpu: FakeGPU, fields: Sequence[tuple[int, int]]) -> list[SimpleNamespace]:
        self._value("nvmlDeviceGetFieldValues", gpu, 0)
        told = {
            (pynvml.NVML_FI_DEV_POWER_INSTANT, pynvml.NVML_POWER_SCOPE_GPU): gpu.instant_mw,
            (pynvml.NVML_FI_DEV_POWER_AVERAGE, pynvml.NVML_POWER_SCOPE_MODULE): gpu.module_mw,
        }
        return [
            SimpleNamespace(nvmlReturn=pynvml.NVML_ERROR_NOT_SUPPORTED, value=None)
            if (mw := told.get(field)) is None
            else SimpleNamespace(nvmlReturn=pynvml.NVML_SUCCESS, value=SimpleNamespace(uiVal=mw))
            for field in fields
        ]

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: FakeGPU) -> int:
        return self._value("nvmlDeviceGetEnforcedPowerLimit", gpu, gpu.limit_mw)

    def nvmlDeviceGetName(self, gpu: FakeGPU) -> str:
        return gpu.name

    def nvmlDeviceGetClockInfo(self, gpu: FakeGPU, clock: int) -> int:
        return self._value("nvmlDeviceGetClockInfo", gpu, None if gpu.clocks_mhz is None else gpu.clocks_mhz[clock])

    def nvmlDeviceGetMaxClockInfo(self, gpu: FakeGPU, clock: int) -> int:
        return self._value("nvmlDeviceGetMaxClockInfo", gpu, gpu.max_clocks_mhz[clock])

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGPU) -> SimpleNamespace:
        return SimpleNamespace(
            total=self._value("nvmlDeviceGetMemoryInfo", gpu, gpu.memory_bytes),
            used=self._value("nvmlDeviceGetMemoryInfo", gpu, gpu.used_bytes),
        )

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGPU) -> list[SimpleNamespace]:
        if gpu.pids is None:
            self._raise(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [SimpleNamespace(pid=pid) for pid in gpu.pids or ()]


def install_nvml(monkeypatch: pytest.MonkeyPatch, nvml: FakeNVML) -> FakeNVML:
    """Replace pynvml by a fake in all modules that use it. Returns the fake."""
    for module in (gpu_counters, gpu_info):
        monkeypatch.setattr(module, "pynvml", nvml)
    return nvml


def write_zone(
    root: Path,
    zone: str,
    name: str,
    *,
    energy_uj: int = 1_000_000,
    range_uj: int = 262_143_328_850,
    limits_uw: Sequence[int] = (),
) -> Path:
    """Write one zone of a powercap tree, without nested folders, as in /sys/class/powercap."""
    path = root / zone
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    for index, limit_uw in enumerate(limits_uw):
        (path / f"constraint_{index}_power_limit_uw").write_text(f"{limit_uw}\n")
    return path


def set_energy(zone: Path, energy_uj: int) -> None:
    (zone / "energy_uj").write_text(f"{energy_uj}\n")


def write_process(
    root: Path, pid: int, parent: int, *, ticks: Sequence[int] = (0, 0, 0, 0), started: int = 100, name: str = "python"
) -> None:
    """Write one process of a proc tree. ``ticks``: utime, stime, cutime, cstime."""
    path = root / str(pid)
    path.mkdir(parents=True, exist_ok=True)
    fields = ["R", parent, *[0] * 9, *ticks, 20, 0, 1, 0, started, *[0] * 20]
    (path / "stat").write_text(f"{pid} ({name}) {' '.join(map(str, fields))}\n")


def write_busy(root: Path, ticks: int) -> None:
    """Write the busy time of the CPUs of a proc tree; their idle time is twice as long."""
    (root / "stat").write_text(f"cpu  {ticks} 0 0 {2 * ticks} 7 0 0 0 0 0\ncpu0 {ticks} 0 0 {2 * ticks} 7 0 0 0 0 0\n")


def end_process(root: Path, pid: int) -> None:
    (root / str(pid) / "stat").unlink()
    (root / str(pid)).rmdir()
