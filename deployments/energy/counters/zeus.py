"""GPUs that NVML does not support (AMD), through the optional package zeus, which is imported only when needed.

Only `zeus.device` is used: it reads counters. Zeus' own windows return 0 J where they can't measure.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from deployments.energy.counters.nvml import GPU_LIMIT_W
from deployments.energy.counters.probe import Source, Unreadable
from deployments.machine.gpus import ReadFailed
from registry.errors import in_one_line
from registry.wire.labels import Label


class ZeusGPU(Source):
    """The energy counter of a GPU, mJ since its driver was loaded.

    Source: Zeus, zeus.device.gpu.common.GPU.get_total_energy_consumption.
    """

    method = "zeus-energy-counter"
    label = Label.MEASURED
    origin = "energy counter of the GPU, read by zeus"
    step = 1e-3
    default_limit_w = GPU_LIMIT_W

    def __init__(self, index: int, gpu: Any) -> None:
        self.name = f"gpu:zeus-{index}"
        self._gpu = gpu
        self.read_limit()

    def read_limit(self) -> None:
        """Read the power limit again; it stays unchanged if the GPU does not report it."""
        with suppress(Exception):  # zeus raises errors of the vendors' libraries
            self.limit_w = max(float(self._gpu.get_power_management_limit()) / 1000, self.limit_w or 0.0)

    def read(self, now_s: float) -> float:
        """Return the joules since the driver was loaded."""
        try:
            return float(self._gpu.get_total_energy_consumption()) / 1000
        except Exception as error:
            raise ReadFailed(in_one_line(error)) from error

    def power_w(self) -> float | None:
        """Return the power at this moment, W; None if the read fails."""
        try:
            return float(self._gpu.get_instant_power_usage()) / 1000
        except Exception:
            return None

    def contended(self, now_s: float) -> bool | None:
        """Return None: unknown."""
        return None


def zeus_gpus(count: int) -> list[Source | Unreadable]:
    """Return all GPUs of a wrapper, found by zeus through the vendor's environment variables.

    A GPU that can't be read is `Unreadable`; if not all ``count`` GPUs are found, the result is a single `Unreadable`.
    Empty if zeus is not installed.
    """
    if find_spec("zeus") is None:
        return []
    try:
        gpus = list(import_module("zeus.device").get_gpus().gpus)
        if len(gpus) != count:
            return [Unreadable("gpu:zeus", f"zeus finds {len(gpus)} GPUs, not the {count} reserved", in_boundary=True)]
        return [_probe(index, gpu) for index, gpu in enumerate(gpus)]
    except Exception as error:
        return [Unreadable("gpu:zeus", in_one_line(error), in_boundary=True)]


def _probe(index: int, gpu: Any) -> Source | Unreadable:
    source = ZeusGPU(index, gpu)
    try:
        if gpu.supports_get_total_energy_consumption():
            source.read(0.0)
            return source
        why = "it has no energy counter"
    except Exception as error:
        why = in_one_line(error)
    return Unreadable(source.name, why, in_boundary=True)
