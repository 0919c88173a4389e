"""Energy of NVIDIA GPUs: NVML's energy counter, or its power samples if a GPU has none."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pynvml

from deployments.energy.counters.base import CounterLost, Source, Unreadable
from deployments.machine.cpu_time import CPUTimeTree
from deployments.machine.gpus import ReadFailed, power_limit_w
from registry.wire.flags import Flag
from registry.wire.labels import Label

_MAX_SAMPLE_GAP_S = 0.2
"""Longest time between two power samples that are integrated, seconds; the meter polls at least 10
times per second."""

# D54: a sample that is an average is as old as the averaged time
_AVERAGED_S = 1.0
"""NVML's plain power reading is the mean of this many seconds before it, on Ampere (except GA100) and newer.
Source: NVML API, nvmlDeviceGetPowerUsage."""
_REFRESHED_S = 0.1
"""NVML refreshes its readings every 20 to 100 ms. Source: Yang et al. 2024, "Part-time Power Measurements:
nvidia-smi's Lack of Attention" (arXiv 2312.02741), table 1."""
# D57: modules count GPU, CPU and memory
_MODULE = re.compile(r"\bG[HB][23]00\b")
"""Names of GPUs whose energy counter counts their module, with its Grace CPU and all memory (GH200, GB200, GB300).
Source: Zeus, pull request 172 (measured on GH200). For GB200 the same is assumed. If the counter of a GB200 counts the
GPU alone, its figures are flagged: `CounterCheck` compares the counter with the module's power."""
MODULE_LIMIT_W = 4000.0
"""Power limit assumed for a module, W, as NVML reports none: GB200 and GB300, 2,700 W for two GPUs and a CPU, plus half
of that for short peaks (NVIDIA's data sheets)."""
GPU_LIMIT_W = 3000.0
"""Power limit assumed for a GPU that reports none, W: twice the 1,400 W of the largest (NVIDIA B300, data sheet)."""

_SCAN_S = 1.0
"""Minimum time between two searches of this process's descendants for an unknown process on the GPU, seconds."""


class _GPU(Source):
    """A GPU by its UUID. Each object holds NVML open until it is closed."""

    default_limit_w = GPU_LIMIT_W

    def __init__(self, uuid: str, handle: Any, tree: CPUTimeTree) -> None:
        self.name = f"gpu:{uuid}"
        self._handle = handle
        self._tree = tree
        self.read_limit()

    def read_limit(self) -> None:
        """Read the enforced power limit again."""
        told_w = power_limit_w(self._handle)
        if told_w is not None:
            self.limit_w = max(told_w, self.limit_w or 0.0)

    def contended(self, now_s: float) -> bool | None:
        """Whether other compute processes run on the GPU; None if NVML fails or its pids are of another namespace."""
        try:
            users = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}
        except pynvml.NVMLError:
            return None
        if users <= self._tree.pids():
            return False  # without looking at every process of the machine, which takes milliseconds
        self._tree.refresh(now_s, _SCAN_S)
        strangers = users - self._tree.pids()
        # In a container the driver reports pids of the host, which can't be compared with ours.
        if not all(self._tree.exists(pid) for pid in strangers):
            return None
        return bool(strangers)

    def close(self) -> None:
        """Release NVML."""
        pynvml.nvmlShutdown()


class GPUCounter(_GPU):
    """The driver's energy counter, which counts mJ since the driver was loaded and steps every 20 to 100 ms.

    ``covers_cpu``: it counts the whole module, with the CPU and all memory.

    Source: NVML API, nvmlDeviceGetTotalEnergyConsumption (Volta or newer).
    """

    method = "nvml-energy-counter"
    label = Label.MEASURED
    origin = "NVML energy counter of the GPU and its memory"
    step = 1e-3

    def __init__(self, uuid: str, handle: Any, tree: CPUTimeTree, *, module: bool = False) -> None:
        self.covers_cpu = module
        super().__init__(uuid, handle, tree)
        if module:
            self.origin = "NVML energy counter of the module: GPU, CPU and the memory of both"
            self.default_limit_w = MODULE_LIMIT_W

    def read_limit(self) -> None:
        """Read the enforced limit again; not for a module, whose limit differs from its GPU's."""
        if not self.covers_cpu:
            super().read_limit()

    def read(self, now_s: float) -> float:
        """Return the joules since the driver was loaded."""
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except pynvml.NVMLError as error:
            raise ReadFailed(str(error)) from error

    def power_w(self) -> float | None:
        """Return NVML's power reading, W; of the module if the counter counts the module. None if there is none."""
        try:
            if self.covers_cpu:
                return _field_w(self._handle, pynvml.NVML_FI_DEV_POWER_AVERAGE, pynvml.NVML_POWER_SCOPE_MODULE)
            return _power_w(self._handle)
        except pynvml.NVMLError:
            return None


class GPUPower(_GPU):
    """Power samples, integrated by the trapezoid rule, for GPUs without an energy counter.

    With ``instant`` a sample is the power at a moment, else the mean of the last second. Joules from means lag by up to
    a second, so a shorter window can't be resolved.

    Source: NVML API, NVML_FI_DEV_POWER_INSTANT and nvmlDeviceGetPowerUsage: mW of the GPU and its memory.
    """

    method = "nvml-power-samples"
    label = Label.MEASURED_SAMPLED

    def __init__(self, uuid: str, handle: Any, tree: CPUTimeTree, *, instant: bool = False) -> None:
        super().__init__(uuid, handle, tree)
        self._instant = instant
        self._last: tuple[float, float] | None = None
        self.joules_so_far = 0.0
        self.problem: ReadFailed | CounterLost | None = None
        self.sampling_j = 0.0
        """Possible error of ``joules_so_far``, J. The samples show a change of power with a delay: at most one refresh
        time plus one sampling gap. The integral is exact for half of this longest delay. So a change of power causes
        an error of at most the change times half of the longest delay."""
        self._longest_gap_s = 0.0
        # A mean may describe any moment of the averaged time, so the integral lags by at most that time.
        self.max_age_s = (_REFRESHED_S if instant else _AVERAGED_S) + _MAX_SAMPLE_GAP_S
        what = "of the moment" if instant else "each the mean of a second"
        self.origin = f"NVML power samples of the GPU and its memory, {what}, integrated"

    def read(self, now_s: float) -> float:
        """Return the joules since the first sample."""
        try:
            self._sample(now_s)
        except (ReadFailed, CounterLost) as problem:
            self.problem = problem
            raise
        self.problem = None
        return self.joules_so_far

    def _sample(self, now_s: float) -> None:
        try:
            power_w = _instant_w(self._handle) if self._instant else _power_w(self._handle)
        except pynvml.NVMLError as error:
            raise ReadFailed(str(error)) from error
        last, self._last = self._last, (now_s, power_w)
        if self.max_rate is not None and power_w > self.max_rate:
            self._last = None
            raise CounterLost(Flag.IMPLAUSIBLE_POWER)
        if last is not None:
            if now_s - last[0] > _MAX_SAMPLE_GAP_S:
                raise CounterLost(Flag.UNDERSAMPLED)
            gap_s = now_s - last[0]
            self.joules_so_far += gap_s * (last[1] + power_w) / 2
            self.sampling_j += abs(power_w - last[1]) * (_REFRESHED_S + gap_s) / 2
            self._longest_gap_s = max(self._longest_gap_s, gap_s)

    @property
    def unseen_s(self) -> float:
        """How long the power may change unseen, seconds: the refresh time plus the longest gap between samples."""
        return _REFRESHED_S + self._longest_gap_s if self._instant else 0.0

    def unseen(self, lengths_s: Iterable[float]) -> float:
        """Return the joules by which instant samples may be wrong for busy intervals of these lengths, seconds.

        An interval longer than twice ``unseen_s`` shows in the samples; ``sampling_j`` has its error. A shorter one may
        be missed, whatever its power.
        """
        period_s = self.unseen_s
        return period_s * (self.max_rate or 0.0) * sum(length_s < 2 * period_s for length_s in lengths_s)


class GPUPowerAtMost(Source):
    """The upper bound of a GPU's energy by power samples: their integral plus its possible error.

    Read it after the samples. `figures.joined` merges both into one component.
    """

    method = GPUPower.method
    label = Label.MEASURED_SAMPLED

    def __init__(self, samples: GPUPower) -> None:
        self.name, self.origin, self.max_age_s = samples.name, samples.origin, samples.max_age_s
        self._samples = samples

    def read(self, now_s: float) -> float:
        """Return the upper bound of the joules since the first sample."""
        if self._samples.problem is not None:
            raise self._samples.problem
        return self._samples.joules_so_far + self._samples.sampling_j


def _power_w(handle: Any) -> float:
    """Return NVML's plain power reading, W. Raises NVMLError."""
    return float(pynvml.nvmlDeviceGetPowerUsage(handle)) / 1000


def _instant_w(handle: Any) -> float:
    """Return the power at this moment, W. Raises NVMLError."""
    return _field_w(handle, pynvml.NVML_FI_DEV_POWER_INSTANT, pynvml.NVML_POWER_SCOPE_GPU)


def _field_w(handle: Any, field: int, scope: int) -> float:
    """Return a power field of NVML, W. Raises NVMLError if the GPU or its driver does not have it."""
    [value] = pynvml.nvmlDeviceGetFieldValues(handle, [(field, scope)])
    if value.nvmlReturn != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(value.nvmlReturn)
    return float(value.value.uiVal) / 1000


def probe_gpu(uuid: str, tree: CPUTimeTree) -> Source | Unreadable:
    """Return the best source that a GPU offers, or why it offers none (MIG slices and many vGPUs).

    A MIG slice is not tried: the driver's figures would be those of the whole GPU, which other wrappers may use, too.
    """
    name = f"gpu:{uuid}"
    if uuid.startswith("MIG-"):
        return Unreadable(name, "a slice of a GPU (MIG) has no energy counter of its own", in_boundary=True)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Unreadable(name, f"NVML can't be used: {error}", in_boundary=True)
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        try:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            module = _MODULE.search(str(pynvml.nvmlDeviceGetName(handle))) is not None
            return GPUCounter(uuid, handle, tree, module=module)
        except pynvml.NVMLError as error:
            no_counter = str(error)
        try:
            return GPUPower(uuid, handle, tree, instant=_instant_w(handle) > 0)
        except pynvml.NVMLError:
            pass  # an older driver or GPU
        try:
            _power_w(handle)
            return GPUPower(uuid, handle, tree)
        except pynvml.NVMLError as error:
            why = f"no energy counter ({no_counter}) and no power reading ({error})"
    except pynvml.NVMLError as error:
        why = f"no such GPU: {error}"
    pynvml.nvmlShutdown()
    return Unreadable(name, why, in_boundary=True)
