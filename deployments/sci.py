"""Software Carbon Intensity: from joules to gCO2eq per functional unit. "Computed with the SCI formula", no more.

``SCI = (O + M) per R``: O = E · I, the operational emissions of all hardware that was reserved (times PUE), M the
embodied ones for the time of the reservation, R the functional unit.

Source: Green Software Foundation, Software Carbon Intensity specification 1.1 (ISO/IEC 21031:2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from deployments.energy import Embodied, Energy, GridIntensity, Label, SCISettings
from registry.grid_mixes import DATA_FILE, DATASET, zone_intensity

J_PER_KWH = 3_600_000.0
PLAUSIBLE_J_PER_TOKEN = (0.03, 10.0)
"""Output tokens of LLMs on GPUs cost between these, from a full batch to one prompt at a time."""


def kwh(joules: float) -> float:
    """Joules (W·s) in kWh."""
    return joules / J_PER_KWH


def embodied_g_per_hour(te_g: float, lifespan_h: float, share: float = 1.0) -> float:
    """M of an hour's reservation: TE · (1 h / EL) · (RR / ToR); grams and hours > 0, share of the machine 0 to 1."""
    return te_g / lifespan_h * share


def grid_intensity(zone: str) -> GridIntensity:
    """Mean carbon intensity of a zone's electricity, location-based.

    Its year is not known: the data set's file does not say it.

    Args:
        zone: ISO 3166 alpha-3 code, or WOR for the world.

    Raises:
        BadSettings: The data set has no such zone (there is no default), or is not installed.
    """
    value, release = zone_intensity(zone), version(DATASET)
    return GridIntensity(value, zone, DATASET, release, source=f"{DATASET} {release}, {DATA_FILE}")


@dataclass(frozen=True, slots=True)
class Score:
    """An SCI score, gCO2eq per functional unit, and how it came about.

    ``sci_score`` is None when a part is not known, when nothing was produced, or when it would be an estimate and
    estimates are not allowed. ``low`` and ``high`` are None with it, and where nothing has a range. ``o_g`` and
    ``m_g`` are the window's operational and embodied emissions, None if not known, ``duration_s`` the time that was
    reserved. ``method`` is the label of the energy, whether there is a score or not; ``methods`` say for E, I, M and R:
    measured, modeled, sourced …; ``boundary`` names the parts whose energy is inside.
    """

    sci_score: float | None
    low: float | None
    high: float | None
    o_g: float | None
    m_g: float | None
    duration_s: float
    unit: str
    units: int | None
    method: Label
    methods: Mapping[str, str]
    boundary: tuple[str, ...]
    flags: tuple[str, ...]


def score(
    energy: Energy,
    *,
    duration_s: float,
    units: int | None,
    settings: SCISettings,
    grid: GridIntensity | None,
    flags: Sequence[str] = (),
) -> Score:
    """Score a window.

    Args:
        energy: The window's.
        duration_s: How long the hardware was reserved, seconds > 0.
        units: Functional units (``settings.functional_unit``) produced in it, ≥ 0; None: not known.
        settings: The operator's choices.
        grid: Carbon intensity; None if not configured, and then there is no score.
        flags: What is to be said of the window besides.

    Raises:
        ValueError: A duration or a number of units that can't be.
    """
    if duration_s <= 0 or (units is not None and units < 0):
        raise ValueError(f"can't score {units} units in {duration_s} s")
    embodied = settings.embodied
    g_per_j = None if grid is None else kwh(1) * settings.pue * grid.gco2eq_per_kwh
    hours = duration_s / 3600
    o_g = None if g_per_j is None or energy.total_j is None else energy.total_j * g_per_j
    m_g = None if embodied is None else embodied.g_per_hour * hours
    may_be_told = settings.allow_estimates or energy.label in {Label.MEASURED, Label.MEASURED_SAMPLED}
    sci_score = low = high = None
    if o_g is not None and m_g is not None and units and may_be_told:
        sci_score = (o_g + m_g) / units
        if embodied is not None and g_per_j is not None:
            low, high = _range(energy, embodied, g_per_j=g_per_j, hours=hours, units=units)
    problems = {
        "no_grid": grid is None,
        "no_embodied": embodied is None,
        "no_units": units == 0,
        "units_unknown": units is None,
        "estimates_not_allowed": not may_be_told and energy.total_j is not None,
        "implausible_j_per_token": _implausible(energy, units, settings),
    }
    return Score(
        sci_score=sci_score,
        low=low,
        high=high,
        o_g=o_g,
        m_g=m_g,
        duration_s=duration_s,
        unit=settings.functional_unit,
        units=units,
        method=energy.label,
        methods={
            "E": energy.label.value,
            "I": "unavailable" if grid is None else "sourced",
            "M": "unavailable" if embodied is None else "sourced",
            "R": "unavailable" if units is None else "measured",
        },
        boundary=energy.boundary,
        flags=(*energy.flags, *(flag for flag, holds in problems.items() if holds), *flags),
    )


def _range(
    energy: Energy, embodied: Embodied, *, g_per_j: float, hours: float, units: int
) -> tuple[float | None, float | None]:
    """Low and high of a score; None where neither the energy nor the embodied carbon has a range."""
    low_j = energy.total_j if energy.low_j is None else energy.low_j
    high_j = energy.total_j if energy.high_j is None else energy.high_j
    if low_j is None or high_j is None:
        return None, None
    low = (low_j * g_per_j + embodied.low_g_per_hour * hours) / units
    high = (high_j * g_per_j + embodied.high_g_per_hour * hours) / units
    return (low, high) if low < high else (None, None)


def _implausible(energy: Energy, units: int | None, settings: SCISettings) -> bool:
    gpu_j = [part.joules for part in energy.components if part.name.startswith("gpu:") and part.joules is not None]
    if not gpu_j or not units or settings.functional_unit != "output_token":
        return False
    low, high = PLAUSIBLE_J_PER_TOKEN
    return not low <= sum(gpu_j) / units <= high
