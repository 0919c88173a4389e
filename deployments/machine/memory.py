"""Reads how much memory is installed and available: main memory within our container's limit, and GPU memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from deployments.machine.gpus import ReadFailed, gpu_memory

CGROUPS = Path("/sys/fs/cgroup")
"""Mount point of the kernel's control groups."""

OWN_CGROUPS = Path("/proc/self/cgroup")
"""Lists the groups of this process."""


class MainMemory(NamedTuple):
    """Main memory, bytes. ``available_bytes``: what processes can still allocate, including reclaimable caches."""

    total_bytes: int
    available_bytes: int


def main_memory(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> MainMemory:
    """Return the main memory of the machine, or of the tightest control group (container) around this process."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for folder, limit, usage in _groups(cgroups, own):
        try:
            limit_bytes = int((folder / limit).read_text())  # "max" means no limit
            used_bytes = int((folder / usage).read_text()) - _reclaimable_bytes(folder)
        except (OSError, ValueError):
            continue
        if limit_bytes < machine.total:
            total, available = min(total, limit_bytes), min(available, max(0, limit_bytes - used_bytes))
    return MainMemory(total, available)


def _groups(cgroups: Path, own: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield the folders of our groups that may limit memory, with the names of their limit and usage files."""
    for line in own.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, files = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # a container may show the host's path: then only the root exists
            yield folder, *files
            if folder == root:
                break


def _reclaimable_bytes(folder: Path) -> int:
    """Return the bytes that a group uses for file pages that can be read again."""
    fields = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def gpu_memory_bytes(gpus: int) -> int | None:
    """Return the memory of each of our GPUs, the smallest if they differ; None if there are none or NVML fails."""
    if not gpus:
        return None
    try:
        memory = gpu_memory(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    except ReadFailed:
        return None  # /machines shows None, and lists the GPUs as not found with NVML's error
    return min((total for _, total in memory.values()), default=None)
