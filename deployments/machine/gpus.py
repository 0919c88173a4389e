"""Reads GPU data other than energy from NVML: which GPUs there are, their memory, clocks, power limits and driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pynvml

_NVML_CLOCK_SM, _NVML_CLOCK_MEM = 1, 2
"""NVML's nvmlClockType_t."""


class ReadFailed(Exception):
    """A hardware value could not be read this time. If it is a counter, the hardware keeps counting."""


def power_limit_w(handle: Any) -> float | None:
    """Return the power limit that is enforced on a GPU now, W; None if NVML does not report it."""
    try:
        return float(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)) / 1000
    except pynvml.NVMLError:
        return None


def gpu_uuids(visible_devices: str) -> tuple[str, ...]:
    """Return the UUIDs of the GPUs in a CUDA_VISIBLE_DEVICES value, which has UUIDs or, as Ray writes it, NVML indices.

    Raises:
        ReadFailed: NVML can't be used or has no such index.
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
    """Return the UUIDs of all GPUs that NVML reports on this machine, no matter which process uses them.

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
    """Return bytes in use and total bytes, by UUID, of the GPUs in a CUDA_VISIBLE_DEVICES value.

    Source: NVML API, nvmlDeviceGetMemoryInfo: ``total`` is the physical memory, including what the driver reserves.

    Raises:
        ReadFailed: NVML can't be used, or does not report all of them.
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
    """Return the settings of the GPUs in a CUDA_VISIBLE_DEVICES value, in its order: power limit [W] and clocks [MHz].

    Values that a GPU does not report are None.

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
    """Return the version of the GPU driver.

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
