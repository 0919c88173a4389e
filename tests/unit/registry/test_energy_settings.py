"""How energy is scored on each machine: what is refused when settings are loaded, and what a wrapper gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from registry.energy_settings import EnergySettings, SiteEnergySettings
from registry.errors import BadSettings
from registry.grid_mixes import grid_mixes
from registry.settings import load_settings

ROOT = Path(__file__).resolve().parents[3]
PER_GPU = {"per": "gpu", "g_per_hour": 37.5, "low_g_per_hour": 16.7, "high_g_per_hour": 49.0, "source": "a sheet"}
PER_MACHINE = {"per": "machine", "g_per_hour": 6.0, "low_g_per_hour": 4.0, "high_g_per_hour": 10.0, "source": "a sheet"}
CPU_MODEL = {
    "idle_w_per_cpu": 1.0,
    "busy_w_per_cpu": 5.0,
    "idle_low_w_per_cpu": 0.5,
    "idle_high_w_per_cpu": 2.0,
    "busy_low_w_per_cpu": 2.5,
    "busy_high_w_per_cpu": 10.0,
    "source": "a test",
}


def of_wrapper(
    settings: dict[str, Any],
    machine: str = "gpu-1",
    gpu_type: str | None = "NVIDIA H100 80GB",
    zone: str | None = "eu-1a",
    *,
    gpus: int = 8,
    on_machine: int = 1,
) -> EnergySettings:
    site = SiteEnergySettings.model_validate(settings)
    return site.of_wrapper(machine=machine, gpu_type=gpu_type, zone=zone, gpus=gpus, on_machine=on_machine)


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("energy", "named"),
    [
        ("grid: {zone: DE}", "energy.grid: ecologits knows no zone 'DE'; did you mean DEU"),
        ("grid: {zone: deu}", "energy.grid: ecologits knows no zone 'deu'; did you mean DEU"),
        ("grid: {zone: DEU, source: me}", "source and date belong to gco2eq_per_kwh"),
        ("grid: {gco2eq_per_kwh: 300, source: me}", "needs source, and year or date"),
        ("grid: {gco2eq_per_kwh: 300, year: 2024}", "needs source, and year or date"),
        ("grid: {gco2eq_per_kwh: 300, year: 24, source: me}", "energy.grid.year"),
        ("grid: {gco2eq_per_kwh: 300, year: 2024, source: me, low_gco2eq_per_kwh: 1}", "or neither"),
        (
            "grid: {gco2eq_per_kwh: 300, year: 2024, source: me, low_gco2eq_per_kwh: 301, high_gco2eq_per_kwh: 400}",
            "needs low_gco2eq_per_kwh <= 300 <= high_gco2eq_per_kwh",
        ),
        ("grid: {zone: FRA, low_gco2eq_per_kwh: 900, high_gco2eq_per_kwh: 950}", "needs low_gco2eq_per_kwh <= "),
        ("embodied: {g_per_hour: 2, low_g_per_hour: 1, high_g_per_hour: 3, source: me}", "energy.embodied.per"),
        (
            "embodied: {per: wrapper, g_per_hour: 2, low_g_per_hour: 1, high_g_per_hour: 3, source: me}",
            "energy.embodied.per",
        ),
        (
            "embodied: {per: gpu, g_per_hour: 2, low_g_per_hour: 3, high_g_per_hour: 1, source: me}",
            "needs low_g_per_hour <= g_per_hour <= high_g_per_hour",
        ),
        (
            "embodied: {per: gpu, g_per_hour: 4, low_g_per_hour: 1, high_g_per_hour: 3, source: me}",
            "needs low_g_per_hour <= g_per_hour <= high_g_per_hour",
        ),
        (
            (
                "cpu_model: {idle_w_per_cpu: 5, idle_low_w_per_cpu: 5, idle_high_w_per_cpu: 5, busy_w_per_cpu: 1, "
                "busy_low_w_per_cpu: 1, busy_high_w_per_cpu: 1, source: me}"
            ),
            "needs idle_w_per_cpu <= busy_w_per_cpu",
        ),
        (
            (
                "cpu_model: {idle_w_per_cpu: 5, idle_low_w_per_cpu: 6, idle_high_w_per_cpu: 7, busy_w_per_cpu: 9, "
                "busy_low_w_per_cpu: 8, busy_high_w_per_cpu: 9, source: me}"
            ),
            "needs low <= value <= high",
        ),
        (
            "cpu_model: {idle_w_per_cpu: 1, busy_w_per_cpu: 5, low_factor: 0.5, high_factor: 2, source: me}",
            "give idle_low_w_per_cpu, idle_high_w_per_cpu, busy_low_w_per_cpu and busy_high_w_per_cpu",
        ),
        ("machines: [{pue: 1.1}]", "energy.machines.0.match"),
        ("machines: [{match: {}}]", "needs machine, gpu_type or zone"),
        ("machines: [{match: {node: a}}]", "energy.machines.0.match.node"),
        ("machines: [{match: {machine: a}, pue: 0.5}]", "energy.machines.0.pue"),
        ("machines: [{match: {machine: a}, grid: {zone: GER}}]", "knows no zone 'GER'"),
        ("machines: [{match: {machine: a}, poll_s: 0.1}]", "energy.machines.0.poll_s"),
    ],
)
def test_unusable_figures_are_refused_when_settings_are_loaded(tmp_path: Path, energy: str, named: str) -> None:
    """Not by a wrapper, minutes later: the error names the field, in entries for single machines as well."""
    path = tmp_path / "settings.yaml"
    path.write_text(f"energy:\n  {energy}\n", encoding="utf-8")
    with pytest.raises(BadSettings, match=re.escape(named)):
        load_settings(path)


def test_a_zone_needs_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package no zone can be looked up, which is said with the remedy."""
    monkeypatch.setattr("registry.grid_mixes.find_spec", lambda _: None)
    grid_mixes.cache_clear()
    try:
        with pytest.raises(ValidationError, match="needs the package ecologits; or give gco2eq_per_kwh"):
            EnergySettings.model_validate({"grid": {"zone": "DEU"}})
    finally:
        grid_mixes.cache_clear()


# --- what a wrapper gets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("embodied", "gpus", "on_machine", "g_per_hour"),
    [
        (PER_GPU, 8, 1, 300.0),  # 8 x 37.5
        (PER_GPU, 2, 4, 75.0),
        (PER_GPU, 0, 1, None),  # nothing is known of a machine without GPU
        (PER_MACHINE, 8, 1, 6.0),
        (PER_MACHINE, 0, 3, 2.0),
    ],
)
def test_embodied_carbon_is_of_what_the_wrapper_reserves(
    embodied: dict[str, Any], gpus: int, on_machine: int, g_per_hour: float | None
) -> None:
    """A figure per GPU is multiplied by the wrapper's GPUs, one per machine divided by the wrappers on it.

    By hand: a wrapper of 8 GPUs at 37.5 g/h each reserves 300 g/h, not 37.5; its range is 8 x (16.7 to 49.0).
    """
    got = of_wrapper({"embodied": embodied}, gpus=gpus, on_machine=on_machine).embodied
    assert (None if got is None else got.g_per_hour) == g_per_hour
    if got is not None:
        factor = got.g_per_hour / embodied["g_per_hour"]
        assert got.low_g_per_hour == pytest.approx(factor * embodied["low_g_per_hour"])
        assert got.high_g_per_hour == pytest.approx(factor * embodied["high_g_per_hour"])
        assert got.source == "a sheet"


def test_wrappers_of_a_machine_add_up_to_it() -> None:
    """Four wrappers that share a machine of 6 g/h have 1.5 each; four with 2 GPUs of 37.5 each have 300 in all."""
    shared = [of_wrapper({"embodied": PER_MACHINE}, gpus=2, on_machine=4).embodied for _ in range(4)]
    assert sum(each.g_per_hour for each in shared if each) == pytest.approx(6.0)
    per_gpu = [of_wrapper({"embodied": PER_GPU}, gpus=2, on_machine=4).embodied for _ in range(4)]
    assert sum(each.g_per_hour for each in per_gpu if each) == pytest.approx(300.0)


SITE: dict[str, Any] = {
    "pue": 1.2,
    "poll_s": 0.1,
    "grid": {"zone": "DEU"},
    "cpu_model": CPU_MODEL,
    "machines": [
        {"match": {"machine": "gpu-*", "zone": "eu-2?"}, "pue": 1.5},
        {"match": {"gpu_type": "NVIDIA H100*"}, "grid": {"zone": "FRA"}, "cpu_model": None},
        {"match": {"machine": "*"}, "pue": 1.9, "embodied": PER_MACHINE},
    ],
}


@pytest.mark.parametrize(
    ("machine", "gpu_type", "zone", "pue", "grid", "cpu_model", "embodied"),
    [
        ("gpu-1", "NVIDIA H100 80GB", "eu-2a", 1.5, "DEU", True, False),
        ("gpu-1", "NVIDIA H100 80GB", "eu-1a", 1.2, "FRA", False, False),
        ("gpu-1", "NVIDIA H100 80GB", None, 1.2, "FRA", False, False),
        ("gpu-1", None, None, 1.9, "DEU", True, True),
        ("cpu-1", "nvidia h100", "eu-2a", 1.9, "DEU", True, True),
    ],
)
def test_the_first_entry_that_fits_counts(
    machine: str, gpu_type: str | None, zone: str | None, pue: float, grid: str, cpu_model: bool, embodied: bool
) -> None:
    """What it leaves out is as on the other machines, null is not known there; later entries do not count.

    All that a match gives must fit, and what is not known of a machine fits nothing.
    """
    got = of_wrapper(SITE, machine, gpu_type, zone)
    assert type(got) is EnergySettings
    assert got.grid is not None
    assert (got.pue, got.grid.zone, got.poll_s) == (pue, grid, 0.1)
    assert (got.cpu_model is not None, got.embodied is not None) == (cpu_model, embodied)


# --- files -------------------------------------------------------------------------------------------------


def test_the_examples_of_production_load(tmp_path: Path) -> None:
    """The commented examples in configs/production.yaml are usable as they stand, one grid at a time."""
    lines = (ROOT / "configs/production.yaml").read_text(encoding="utf-8").splitlines()
    begun = next(n for n, line in enumerate(lines) if line == "energy:")
    examples = [line[4:] for line in lines[begun:] if re.match(r"  # (grid|embodied|machines|  )", line)]
    grids = [line for line in examples if line.startswith("grid:")]
    assert len(grids) == 2
    for grid in grids:
        energy = yaml.safe_load("\n".join([grid, *(line for line in examples if line not in grids)]))
        assert set(energy) == {"grid", "embodied", "machines"}
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump({"energy": energy}), encoding="utf-8")
        assert load_settings(path).energy.machines
