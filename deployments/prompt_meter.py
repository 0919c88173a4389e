"""What a prompt cost: notes when prompts begin and end, and turns the meter's windows into an answer's energy part."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from deployments.attribution import Prompt
from deployments.energy import CPUModel, Embodied, Energy, GridIntensity, SCISettings
from deployments.energy_sources import ReadFailed, Unreadable, gpu_uuids, probe_sources
from deployments.meter import Meter
from deployments.sci import Score, grid_intensity, score
from registry.errors import BadSettings
from registry.settings import EnergySettings

REMEMBERED_PROMPTS = 1024
"""Ended prompts that are kept, to share out the energy of those they overlapped with."""


@dataclass(slots=True)
class Flight:
    """One prompt: when it began and ended in the meter's clock, and its tokens once they are known."""

    start_s: float
    end_s: float | None = None
    tokens: int | None = None


class PromptMeter:
    """The meter of a wrapper, as its prompts see it."""

    def __init__(self, settings: EnergySettings, *, gpus: int, cpus: float | None = None) -> None:
        """Probe this machine's counters by real calls.

        ``gpus``: how many GPUs the wrapper holds; ``cpus``: how many CPUs are its own, None for all of the machine.

        Raises:
            BadSettings: the grid zone is unknown, or a figure of the CPU model is out of range.
        """
        self._sci = sci_settings(settings)
        self._grid = grid_of(settings)
        self._meter = Meter(_sources(self._sci, gpus, cpus), poll_s=settings.poll_s)
        self._flights: deque[Flight] = deque(maxlen=REMEMBERED_PROMPTS)
        self._load: Energy | None = None

    def start(self) -> None:
        """Begin to poll the counters."""
        self._meter.start()

    def stop(self) -> None:
        """End polling."""
        self._meter.stop()

    def describe(self) -> dict[str, object]:
        """What is counted and how, what is not and why; the energy of the last start of an LLM. Plain JSON."""
        load = None if self._load is None else _energy(self._load)
        return {**self._meter.describe(), "last_load": load}

    @contextmanager
    def load(self) -> Iterator[None]:
        """The start of an LLM: charged to its deployment, to no prompt."""
        start_s = self._meter.mark()
        try:
            yield
        finally:
            self._load = self._meter.window(start_s, self._meter.mark())

    def begin(self) -> Flight:
        """A prompt begins now."""
        flight = Flight(self._meter.mark())
        self._flights.append(flight)
        return flight

    def end(self, flight: Flight) -> None:
        """A prompt is over, answered or not."""
        flight.end_s = self._meter.mark()

    def account(self, flight: Flight, *, usage: Mapping[str, Any], answer: str) -> dict[str, Any]:
        """The part of an answer that tells what it cost.

        Args:
            flight: a prompt that has ended.
            usage: vLLM's own account: ``prompt_tokens``, ``completion_tokens``.
            answer: the text that was generated.

        Returns:
            ``sci_score`` (gCO2eq per unit, or None), ``sci_method``, ``sci_low``, ``sci_high``, ``unit``, ``energy``,
            ``carbon``, ``methods``, ``flags``.
        """
        assert flight.end_s is not None  # callers end a prompt before they account for it
        flight.tokens = usage["prompt_tokens"] + usage["completion_tokens"]
        energy = self._energy_of(flight, flight.end_s, flight.tokens)
        units = {
            "output_token": usage["completion_tokens"],
            "token": flight.tokens,
            "request": 1,
            "word": len(answer.split()),
        }[self._sci.functional_unit]
        result = score(
            energy, duration_s=flight.end_s - flight.start_s, units=units, settings=self._sci, grid=self._grid
        )
        return _account(energy, result, self._grid)

    def _energy_of(self, flight: Flight, end_s: float, tokens: int) -> Energy:
        rate = tokens / (end_s - flight.start_s)
        prompts = [Prompt(flight.start_s, end_s, tokens)]
        for other in self._flights:
            other_end_s = end_s if other.end_s is None else other.end_s
            if other is flight or other_end_s <= flight.start_s or other.start_s >= end_s:
                continue
            # Not known yet for prompts that still run: taken to be as fast as this one; the share is modelled anyway.
            others = int(rate * (other_end_s - other.start_s)) if other.tokens is None else other.tokens
            prompts.append(Prompt(other.start_s, other_end_s, others))
        if len(prompts) == 1:
            return self._meter.window(flight.start_s, end_s)
        return self._meter.attribute(flight.start_s, end_s, prompts).shares[0]


def sci_settings(settings: EnergySettings) -> SCISettings:
    """The operator's choices as the formula takes them. Raises BadSettings."""
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
    """The configured carbon intensity, None if none is. Raises BadSettings for an unknown zone."""
    grid = settings.grid
    if grid is None:
        return None
    if grid.zone is not None:
        return grid_intensity(grid.zone)
    if grid.gco2eq_per_kwh is None or grid.source is None or grid.date is None:
        raise BadSettings("energy.grid", "needs zone, or gco2eq_per_kwh with source and date")
    return GridIntensity(grid.gco2eq_per_kwh, None, grid.source, grid.date)


def _sources(settings: SCISettings, gpus: int, cpus: float | None) -> list[Any]:
    unreadable: list[Any] = []
    uuids: tuple[str, ...] = ()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        try:
            uuids = gpu_uuids(visible)
            if len(uuids) != gpus:
                raise ReadFailed(f"CUDA_VISIBLE_DEVICES={visible} names {len(uuids)} GPUs, not the {gpus} reserved")
        except ReadFailed as error:
            # Inside the boundary all the same: without all of them no total is known.
            unreadable.append(Unreadable(f"gpu:{visible}", str(error), in_boundary=True))
    return [*probe_sources(uuids, pid=os.getpid(), settings=settings, cpus=cpus), *unreadable]


def _energy(energy: Energy) -> dict[str, Any]:
    return {
        "total_j": energy.total_j,
        "low_j": energy.low_j,
        "high_j": energy.high_j,
        "resolution_j": energy.resolution_j,
        "label": energy.label.value,
        "components": [
            {**asdict(part), "label": part.label.value, "flags": list(part.flags)} for part in energy.components
        ],
    }


def _account(energy: Energy, result: Score, grid: GridIntensity | None) -> dict[str, Any]:
    return {
        "sci_score": result.sci_score,
        "sci_method": result.method.value,
        "sci_low": result.low,
        "sci_high": result.high,
        "unit": result.unit,
        "units": result.units,
        "energy": _energy(energy),
        "carbon": {"o_g": result.o_g, "m_g": result.m_g, "grid": None if grid is None else asdict(grid)},
        "methods": dict(result.methods),
        "flags": list(result.flags),
    }
