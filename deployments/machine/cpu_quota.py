"""The number of CPUs that this process may use: its CPU affinity, or less if its container has a CPU quota."""

from __future__ import annotations

import os
from pathlib import Path


def cpus_here(cgroup_root: Path = Path("/sys/fs/cgroup"), affinity: int | None = None) -> float:
    """Return the number of CPUs that this process may use, > 0, possibly a fraction.

    In a container the cgroup root is the container's own. Outside of one, the root has no quota.

    Source: Linux, Documentation/admin-guide/cgroup-v2 (cpu.max) and scheduler/sched-bwc (cpu.cfs_quota_us).
    """
    cpus = float(len(os.sched_getaffinity(0)) if affinity is None else affinity)
    quotas = (_quota(cgroup_root, "cpu.max"), _quota(cgroup_root / "cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return min([cpus, *(quota for quota in quotas if quota is not None)])


def _quota(folder: Path, *names: str) -> float | None:
    """Return quota divided by period (both in µs); None if there is no limit (``max`` or -1) or no such file."""
    try:
        quota_us, period_us = " ".join((folder / name).read_text() for name in names).split()
        return int(quota_us) / int(period_us) if int(quota_us) > 0 and int(period_us) > 0 else None
    except (OSError, ValueError):
        return None
