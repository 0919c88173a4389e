"""A stand-in for the module ``pynvml``: its functions, driven by a simulated clock."""
# ruff: noqa: N802  (the names are pynvml's)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pynvml

from tests.energy_world.counters import GpuCounter
from tests.energy_world.history import History, llm_of
from tests.energy_world.machine import GIB, Gpu
from tests.energy_world.truth import Truth

CONTEXT_BYTES = GIB // 2
IDLE_MHZ, BOOST_MHZ, SLOWED_MHZ, MEMORY_MHZ = 345, 1980, 1410, 2619


@dataclass(frozen=True)
class Handle:
    """What a caller gets for a GPU, and should not look into."""

    gpu: Gpu
    counter: GpuCounter


class Nvml:
    """Pass this where code expects the module ``pynvml``.

    Constants and errors are the real module's. A function that is not simulated raises "Not Supported". On a module
    (GH200), total energy and power usage are those of the whole module; the power fields tell the two apart by scope.
    """

    def __init__(self, truth: Truth, counters: Sequence[GpuCounter], now_s: Callable[[], float]) -> None:
        self._truth, self._now_s = truth, now_s
        self._history: History = truth.history
        self._handles = [Handle(gpu, counter) for gpu, counter in zip(truth.machine.gpus, counters, strict=True)]
        self._users = 0
        self.calls = 0
        """How many functions were called."""

    def __getattr__(self, name: str) -> Any:
        known = getattr(pynvml, name)
        if not name.startswith("nvml"):
            return known

        def not_supported(*_: object) -> None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

        return not_supported

    def nvmlInit(self) -> None:
        """Start; without a GPU there is no driver."""
        if not self._handles:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self._users += 1

    def nvmlInitWithFlags(self, flags: int) -> None:
        """Start, whatever the flags are."""
        self.nvmlInit()

    def nvmlShutdown(self) -> None:
        """Stop; the last caller of several really does."""
        self._started()
        self._users -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        """Return the driver's version."""
        self._started()
        return "570.86.15"

    def nvmlDeviceGetCount(self) -> int:
        """Return the number of GPUs in the machine."""
        self._started()
        return len(self._handles)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Handle:
        """Return a handle. Raises "Invalid Argument" for an unknown index."""
        self._started()
        if not 0 <= index < len(self._handles):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._handles[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str | bytes) -> Handle:
        """Return a handle. Raises "Not Found" for an unknown UUID."""
        self._started()
        text = uuid.decode() if isinstance(uuid, bytes) else uuid
        for handle in self._handles:
            if handle.gpu.uuid == text:
                return handle
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetIndex(self, handle: Handle) -> int:
        """Return the index."""
        self._started()
        return handle.gpu.index

    def nvmlDeviceGetUUID(self, handle: Handle) -> str:
        """Return the UUID."""
        self._started()
        return handle.gpu.uuid

    def nvmlDeviceGetName(self, handle: Handle) -> str:
        """Return the product's name."""
        self._started()
        return handle.gpu.name

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Handle) -> int:
        """Return the counter [mJ]. Raises "Not Supported" on a GPU without one."""
        now_s = self._reached(handle)
        if not handle.counter.has_energy:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return handle.counter.energy_mj(now_s)

    def nvmlDeviceGetPowerUsage(self, handle: Handle) -> int:
        """Return the mean power of the last second [mW]."""
        now_s = self._reached(handle)
        return handle.counter.mean_mw(now_s)

    def nvmlDeviceGetFieldValues(self, handle: Handle, field_ids: Sequence[int | tuple[int, int]]) -> Any:
        """Return the real module's structures, for energy, mean and instant power."""
        now_s = self._reached(handle)
        values = (pynvml.c_nvmlFieldValue_t * len(field_ids))()
        for value, wanted in zip(values, field_ids, strict=True):
            value.fieldId, value.scopeId = wanted if isinstance(wanted, tuple) else (wanted, 0)
            value.timestamp = int(self._history.wall_s(now_s) * 1e6)
            self._fill(value, handle, now_s)
        return values

    def _fill(self, value: Any, handle: Handle, now_s: float) -> None:
        counter = handle.counter
        tick_s = counter.ticks_s[counter.tick(now_s)]
        # Scope 1 is the module, scope 0 the GPU alone.
        gpu_only = self._truth.machine.is_module and value.scopeId == pynvml.NVML_POWER_SCOPE_GPU
        power = self._truth.gpus[handle.gpu.index] if gpu_only else counter.power
        known = value.scopeId == 0 or (value.scopeId == 1 and self._truth.machine.is_module)
        value.nvmlReturn = pynvml.NVML_SUCCESS
        if value.fieldId == pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION and counter.has_energy:
            value.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
            value.value.ullVal = counter.energy_mj(now_s)
        elif value.fieldId == pynvml.NVML_FI_DEV_POWER_INSTANT and counter.has_instant and known:
            value.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
            value.value.uiVal = int(power.at(tick_s) * 1000)
        elif value.fieldId == pynvml.NVML_FI_DEV_POWER_AVERAGE and counter.has_instant and known:
            value.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
            value.value.uiVal = int(power.between(tick_s - 1.0, tick_s) * 1000)
        else:
            value.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Handle) -> int:
        """Return the limit of this moment [mW]."""
        now_s = self._reached(handle)
        return int(handle.gpu.limit_w(now_s) * 1000)

    def nvmlDeviceGetPowerManagementLimit(self, handle: Handle) -> int:
        """Return the limit that was set [mW]."""
        return self.nvmlDeviceGetEnforcedPowerLimit(handle)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Handle) -> list[SimpleNamespace]:
        """Return the processes with a context on the GPU: their ids and memory [bytes]."""
        now_s = self._reached(handle)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self._processes(handle.gpu, now_s)]

    def nvmlDeviceGetMemoryInfo(self, handle: Handle) -> SimpleNamespace:
        """Return total, used and free memory [bytes]."""
        now_s = self._reached(handle)
        used = GIB // 2 + sum(used for _, used in self._processes(handle.gpu, now_s))
        total = handle.gpu.memory_bytes
        return SimpleNamespace(total=total, used=used, free=total - used)

    def nvmlDeviceGetClockInfo(self, handle: Handle, kind: int) -> int:
        """Return a clock [MHz]: low when idle, lower than the most at the power limit."""
        now_s = self._reached(handle)
        if kind == pynvml.NVML_CLOCK_MEM:
            return MEMORY_MHZ
        power_w = self._truth.gpus[handle.gpu.index].at(now_s)
        if power_w <= handle.gpu.idle_w + handle.gpu.context_w + handle.gpu.load_w + 1.0:
            return IDLE_MHZ
        return SLOWED_MHZ if power_w > handle.gpu.limit_w(now_s) - 1.0 else BOOST_MHZ

    def nvmlDeviceGetMaxClockInfo(self, handle: Handle, kind: int) -> int:
        """Return the highest clock [MHz]."""
        self._reached(handle)
        return MEMORY_MHZ if kind == pynvml.NVML_CLOCK_MEM else BOOST_MHZ

    def _processes(self, gpu: Gpu, now_s: float) -> list[tuple[int, int]]:
        machine = self._truth.machine
        found = []
        for engine in self._history.engines:
            gpus = machine.wrapper(engine.wrapper).gpus
            if gpu.index in gpus and engine.begin_s <= now_s < engine.end_s:
                weights = llm_of(machine, engine.llm).memory_bytes // len(gpus) if now_s >= engine.loaded_s else 0
                # The engine's worker holds the context.
                found.append((engine.pid + 1, min(CONTEXT_BYTES + weights, gpu.memory_bytes - 3 * GIB)))
        strangers = [s for s in self._history.strangers if s.gpu == gpu.index and s.begin_s <= now_s < s.end_s]
        return found + [(stranger.pid, GIB) for stranger in strangers]

    def _started(self) -> None:
        self.calls += 1
        if self._users < 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    def _reached(self, handle: Handle) -> float:
        self._started()
        now_s = self._now_s()
        if handle.counter.is_lost(now_s):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return now_s
