"""Builds from the settings what a meter needs: the factors of scores, and the energy sources of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from deployments.energy.counters.base import Source, Unreadable
from deployments.energy.counters.probe import probe_sources
from deployments.energy.counters.zeus import zeus_gpus
from deployments.energy.figures import CPUModel, Embodied, GridIntensity, SCISettings
from deployments.energy.sci import grid_intensity
from deployments.machine.gpus import ReadFailed, gpu_uuids
from deployments.machine.machine_cpu import MachineCPU
from registry.errors import BadSettings
from registry.settings import EnergySettings


def sci_settings(settings: EnergySettings) -> SCISettings:
    """Return the operator's settings for the SCI formula. Raises BadSettings for an invalid CPU model."""
    embodied = None if settings.embodied is None else Embodied(**settings.embodied.model_dump())
    cpu_model = None if settings.cpu_model is None else CPUModel(**settings.cpu_model.model_dump())
    return SCISettings(
        pue=settings.pue,
        functional_unit=settings.functional_unit,
        allow_estimates=settings.allow_estimates,
        embodied=embodied,
        cpu_model=cpu_model,
    )


def grid_of(settings: EnergySettings) -> GridIntensity | None:
    """Return the configured carbon intensity, None if there is none.

    Raises:
        BadSettings: The zone is unknown, or there is neither a zone nor a value with its source, or the
            value is not within its range.
    """
    grid = settings.grid
    if grid is None:
        return None
    low, high = grid.low_gco2eq_per_kwh, grid.high_gco2eq_per_kwh
    if grid.zone is not None:
        return replace(grid_intensity(grid.zone), year=grid.year, low=low, high=high)
    if grid.gco2eq_per_kwh is None or grid.source is None:
        raise BadSettings("energy.grid", "needs zone, or gco2eq_per_kwh with source, and year or date")
    version = grid.date or str(grid.year)
    return GridIntensity(grid.gco2eq_per_kwh, None, grid.source, version, grid.year, grid.source, low, high)


def sources_of(
    settings: SCISettings, gpus: int, cpus: float | None, machine: MachineCPU | None = None, on_machine: int = 1
) -> list[Source | Unreadable]:
    """Return the energy sources of a wrapper that holds ``gpus`` GPUs and ``cpus`` CPUs (None: all CPUs).

    Each source is tried with a real call. GPUs that can't be read still belong to the boundary, so
    that no total is known without them.
    """
    others: Sequence[Source | Unreadable] = []
    uuids: tuple[str, ...] = ()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        try:
            uuids = gpu_uuids(visible)
            if len(uuids) != gpus:
                raise ReadFailed(f"CUDA_VISIBLE_DEVICES={visible} names {len(uuids)} GPUs, not the {gpus} reserved")
        except ReadFailed as error:
            # Zeus may know them.
            others = zeus_gpus(gpus) or [Unreadable(f"gpu:{visible}", str(error), in_boundary=True)]
    probed = probe_sources(uuids, pid=os.getpid(), settings=settings, cpus=cpus, machine=machine, on_machine=on_machine)
    return [*probed, *others]
