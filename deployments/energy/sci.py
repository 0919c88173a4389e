"""Computes the Software Carbon Intensity, gCO2eq per functional unit.

A score is "computed with the SCI formula"; conformance with the specification is not claimed.

``SCI = (O + M) per R``: O = E · I, the operational emissions of all reserved hardware (times PUE), M the embodied
emissions for the reserved time, R the functional unit.

Source: Green Software Foundation, Software Carbon Intensity specification 1.1 (ISO/IEC 21031:2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import NamedTuple

from deployments.energy.figures import Embodied, Energy, GridIntensity, SCISettings
from registry.grid_mixes import DATA_FILE, DATASET, zone_intensity
from registry.wire.flags import Flag
from registry.wire.labels import MEASURED, Label, worst

_Range = tuple[float, float, float]
"""Low, estimate and high."""
J_PER_KWH = 3_600_000.0
PLAUSIBLE_J_PER_TOKEN = (0.03, 10.0)
"""Plausible range for LLMs on GPUs, J per output token, from a full batch to one prompt at a time."""


def grid_intensity(zone: str) -> GridIntensity:
    """Return the mean carbon intensity of a zone's electricity, location-based.

    Its year is unknown: the data set's file does not state it.

    Args:
        zone: ISO 3166 alpha-3 code, or WOR for the world.

    Raises:
        BadSettings: The data set has no such zone (there is no default), or is not installed.
    """
    value, release = zone_intensity(zone), version(DATASET)
    return GridIntensity(value, zone, DATASET, release, source=f"{DATASET} {release}, {DATA_FILE}")


class Score(NamedTuple):
    """An SCI score, gCO2eq per functional unit, with its parts and their methods.

    Unknown values are None. Low and high are known whenever their value is.

    Attributes:
        sci_score: None if a part is unknown, if nothing was produced, or if the energy is an estimate and estimates
            are not allowed.
        low, high: Its range, from the ranges of the energy (with the counter's resolution), the grid and the embodied
            carbon together. A value without a range counts as exact.
        o_g, o_low_g, o_high_g: Operational emissions, gCO2eq.
        m_g, m_low_g, m_high_g: Embodied emissions, gCO2eq.
        duration_s: The reserved time, seconds.
        unit, units: The functional unit, and how many of them were produced.
        method: The worst of ``methods``, even without a score.
        methods: Labels of E, I, M and R.
        flags: What is wrong or unusual.
    """

    sci_score: float | None
    low: float | None
    high: float | None
    o_g: float | None
    o_low_g: float | None
    o_high_g: float | None
    m_g: float | None
    m_low_g: float | None
    m_high_g: float | None
    duration_s: float
    unit: str
    units: int | None
    method: Label
    methods: Mapping[str, str]
    flags: tuple[str, ...]


def score(
    energy: Energy,
    *,
    duration_s: float,
    units: int | None,
    settings: SCISettings,
    grid: GridIntensity | None,
    flags: Sequence[str] = (),
    duration_range_s: tuple[float, float] | None = None,
) -> Score:
    """Return the score of a window.

    Args:
        energy: The window's energy.
        duration_s: How long the hardware was reserved, seconds > 0.
        units: Functional units (``settings.functional_unit``) produced in it, ≥ 0; None if unknown.
        settings: The operator's settings.
        grid: Carbon intensity; None if not configured: then there is no score.
        flags: Further flags of the window.
        duration_range_s: The least and the most that the duration can be, if it is a share; None: exact.

    Raises:
        ValueError: The duration is not > 0, or ``units`` is < 0.
    """
    if duration_s <= 0 or (units is not None and units < 0):
        raise ValueError(f"can't score {units} units in {duration_s} s")
    operational = _operational(energy, grid, settings.pue)
    embodied = _embodied(settings.embodied, duration_s, duration_range_s)
    # The operator allows a score of estimates, or hardware measured the energy.
    allowed = settings.allow_estimates or energy.label in MEASURED
    per_unit = _per_unit(operational, embodied, units) if allowed else None
    methods = _methods(energy, grid, embodied, units)
    problems = _problems(energy, grid, embodied, units, allowed=allowed)
    if settings.functional_unit == "output_token" and _implausible(energy, units):
        problems.append(Flag.IMPLAUSIBLE_J_PER_TOKEN)
    low, sci_score, high = per_unit or (None, None, None)
    o_low_g, o_g, o_high_g = operational or (None, None, None)
    m_low_g, m_g, m_high_g = embodied or (None, None, None)
    return Score(
        sci_score=sci_score,
        low=low,
        high=high,
        o_g=o_g,
        o_low_g=o_low_g,
        o_high_g=o_high_g,
        m_g=m_g,
        m_low_g=m_low_g,
        m_high_g=m_high_g,
        duration_s=duration_s,
        unit=settings.functional_unit,
        units=units,
        method=worst(methods.values()),
        methods=methods,
        flags=(*energy.flags, *problems, *flags),
    )


def _per_unit(operational: _Range | None, embodied: _Range | None, units: int | None) -> _Range | None:
    """Return (O + M) / R, gCO2eq per unit; None if a part is unknown, or no unit was produced."""
    if operational is None or embodied is None or not units:
        return None
    (o_low, o_mid, o_high), (m_low, m_mid, m_high) = operational, embodied
    return (o_low + m_low) / units, (o_mid + m_mid) / units, (o_high + m_high) / units


def _problems(
    energy: Energy, grid: GridIntensity | None, embodied: _Range | None, units: int | None, *, allowed: bool
) -> list[Flag]:
    """Return flags for what the score lacks; ``allowed``: whether the operator allows a score of this energy."""
    problems = {
        Flag.NO_GRID: grid is None,
        Flag.NO_EMBODIED: embodied is None,
        Flag.NO_UNITS: units == 0,
        Flag.UNITS_UNKNOWN: units is None,
        Flag.ESTIMATES_NOT_ALLOWED: not allowed and energy.total_j is not None,
    }
    return [flag for flag, holds in problems.items() if holds]


def _methods(
    energy: Energy, grid: GridIntensity | None, embodied: _Range | None, units: int | None
) -> dict[str, Label]:
    """Return how each part of SCI = (E · I + M) / R was determined."""
    return {
        "E": energy.label,
        "I": Label.UNAVAILABLE if grid is None else Label.SOURCED,
        "M": Label.UNAVAILABLE if embodied is None else Label.SOURCED,
        "R": Label.UNAVAILABLE if units is None else Label.MEASURED,
    }


def _operational(energy: Energy, grid: GridIntensity | None, pue: float) -> _Range | None:
    if grid is None or energy.total_j is None or energy.low_j is None or energy.high_j is None:
        return None
    low, high = grid.range
    return (
        energy.low_j / J_PER_KWH * pue * low,
        energy.total_j / J_PER_KWH * pue * grid.gco2eq_per_kwh,
        energy.high_j / J_PER_KWH * pue * high,
    )


def _embodied(embodied: Embodied | None, mid_s: float, range_s: tuple[float, float] | None) -> _Range | None:
    if embodied is None:
        return None
    low_s, high_s = (mid_s, mid_s) if range_s is None else (min(range_s[0], mid_s), max(range_s[1], mid_s))
    return (
        embodied.low_g_per_hour * low_s / 3600,
        embodied.g_per_hour * mid_s / 3600,
        embodied.high_g_per_hour * high_s / 3600,
    )


def _implausible(energy: Energy, units: int | None) -> bool:
    gpu_j = [part.joules for part in energy.components if part.name.startswith("gpu:") and part.joules is not None]
    if not gpu_j or not units:
        return False
    low, high = PLAUSIBLE_J_PER_TOKEN
    return not low <= sum(gpu_j) / units <= high
