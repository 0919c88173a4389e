"""How much memory this machine has: main memory as the kernel allows it to us, and that of our GPUs."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from deployments.energy_sources import ReadFailed, gpu_memory

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""What a container may use; ``max``, or no such file, where there is no limit."""


def main_memory_bytes(cgroup_limit: Path = CGROUP_LIMIT) -> int:
    """Main memory of the machine, or of the container that this process runs in."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(cgroup_limit.read_text()))
    except (OSError, ValueError):  # no cgroup of version 2, or no limit ("max")
        return total


def gpu_memory_bytes(gpus: int) -> int | None:
    """Memory of each of our GPUs, the smallest if they differ; None: there is none, or NVML does not tell."""
    if not gpus:
        return None
    try:
        memory = gpu_memory(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    except ReadFailed:
        return None  # which /machines shows; the meter says what NVML said
    return min((total for _, total in memory.values()), default=None)
