"""What NVML tells of GPUs besides their energy: which there are, their memory, clocks, power limits and driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pynvml

from deployments.energy.counters.base import ReadFailed

_NVML_CLOCK_SM, _NVML_CLOCK_MEM = 1, 2
"""NVML's nvmlClockType_t."""


def power_limit_w(handle: Any) -> float | None:
    """The power that a GPU is limited to now, W; None if it does not tell."""
    try:
        return float(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)) / 1000
    except pynvml.NVMLError:
        return None


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


def all_gpu_uuids() -> tuple[str, ...]:
    """The UUIDs of all GPUs that NVML sees on this machine, whoever has them.

    Raises:
        ReadFailed: NVML can't be used.
    """
    try:
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            return tuple(str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise ReadFailed(f"the GPUs of this machine: {error}") from error


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
        "power_limit_w": power_limit_w(handle),
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
