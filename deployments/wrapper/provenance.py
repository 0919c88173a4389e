"""What an LLM runs on and as what, for the record of a request: the wrapper's part of registry.core.provenance."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from deployments.energy.counters.probe import ReadFailed, gpu_settings

CPUINFO = Path("/proc/cpuinfo")

log = structlog.get_logger("deployments.wrapper.provenance")


def cpu_here(cpuinfo: Path = CPUINFO) -> dict[str, object]:
    """The machine's CPU by its own name (None: it tells none), and how many logical ones there are.

    Source: proc_cpuinfo(5); ``model name`` is what x86 has, others have no such line.
    """
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"model": next(names, None), "logical": os.cpu_count()}


def gpus_here(gpus: int) -> list[dict[str, Any]] | None:
    """How this process' GPUs are set now; an empty list without any, None where NVML does not tell."""
    if not gpus:
        return []
    try:
        return gpu_settings(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    except ReadFailed as error:
        log.warning("how the GPUs are set is not known", reason=str(error))
        return None


def provenance(
    *,
    cpu: Mapping[str, object],
    gpus: list[dict[str, Any]] | None,
    versions: Mapping[str, str],
    model: str,
    revision: str | None,
    weights_sha256: str | None,
    engine_args: Mapping[str, Any],
) -> dict[str, object]:
    """What an LLM is handed over with, as plain JSON."""
    return {
        "cpu": dict(cpu),
        "gpus": gpus,
        "versions": dict(versions),
        "model": {"name": model, "revision": revision, "weights_sha256": weights_sha256},
        "engine_args": dict(engine_args),
    }
