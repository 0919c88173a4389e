"""Carbon intensity of electricity by zone, from the data of the package ecologits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from registry.errors import BadSettings

DATASET: Final = "ecologits"
DATA_FILE: Final = "data/electricity_mixes.json"
"""The file states neither year nor source of its figures."""


@lru_cache(maxsize=1)
def grid_mixes() -> Mapping[str, float]:
    """Return gCO2eq/kWh by zone.

    Reads the package's data file, which takes 1 ms. The package itself is not imported: that takes 0.7 s
    of CPU.

    Raises:
        BadSettings: The package is not installed.
    """
    spec = find_spec(DATASET)
    if spec is None or not spec.submodule_search_locations:
        raise BadSettings("energy.grid.zone", f"needs the package {DATASET}; or give gco2eq_per_kwh, source and date")
    path = Path(next(iter(spec.submodule_search_locations))) / DATA_FILE
    mixes = json.loads(path.read_text(encoding="utf-8"))["electricity_mixes"]
    return {mix["name"]: float(mix["gwp"]) * 1000 for mix in mixes}


def zone_intensity(zone: str) -> float:
    """Return the mean carbon intensity of a zone, gCO2eq/kWh, location-based.

    Args:
        zone: ISO 3166 alpha-3 code, or WOR for the world.

    Raises:
        BadSettings: The data set does not contain the zone (there is no default), or is not installed.
    """
    mixes = grid_mixes()
    if zone not in mixes:
        close = get_close_matches(zone.upper(), mixes, n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "zones are ISO 3166 alpha-3 codes, as in DEU"
        raise BadSettings("energy.grid.zone", f"{DATASET} knows no zone {zone!r}; {hint}")
    return mixes[zone]
