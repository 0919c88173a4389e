"""The energy of NVIDIA's GPUs: NVML's energy counters, or its power samples where a GPU has none."""

from __future__ import annotations

from typing import Any

import pynvml

from deployments.cpu_time import CPUTimeTree
from deployments.energy import Label
from deployments.gpu_info import power_limit_w
from deployments.source import CounterLost, ReadFailed, Source, Unreadable

_MAX_SAMPLE_GAP_S = 0.2
"""Longest time between two power samples that are integrated; the label promises 10 a second."""

GPU_LIMIT_W = 3000.0
"""Limit for a GPU that tells none: twice the 1,400 W of the largest ones (NVIDIA B300, by its data sheet)."""


class _GPU(Source):
    """A GPU by its UUID. Each one holds NVML open until it is closed."""

    default_limit_w = GPU_LIMIT_W

    def __init__(self, uuid: str, handle: Any, tree: CPUTimeTree) -> None:
        self.name = f"gpu:{uuid}"
        self._handle = handle
        self._tree = tree
        self.limit_w = power_limit_w(handle)

    def read_limit(self) -> None:
        """Read the power limit that is enforced again."""
        told_w = power_limit_w(self._handle)
        if told_w is not None:
            self.limit_w = max(told_w, self.limit_w or 0.0)

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


def probe_gpu(uuid: str, tree: CPUTimeTree) -> Source | Unreadable:
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
