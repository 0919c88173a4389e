"""Energy windows for tests, as a wrapper tells them, and a small experiment made of some."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import count
from typing import Any

from registry.report import MeasurementReport, report_of
from registry.state import EnergyWindow, KeptWindow, LLMSpec, Measurement, Request, WindowKind, canonical_json

BEGUN_S = 1_800_000_000.0
GRID = {"value": 329.7, "unit": "gCO2eq/kWh", "zone": "DEU", "dataset": "ecologits", "version": "0.11.1"}
EMBODIED = {"g_per_hour": 37.5, "low_g_per_hour": 16.7, "high_g_per_hour": 49.0, "source": "somebody's sheet"}
METHODS = {"E": "measured", "I": "sourced", "M": "sourced", "R": "measured"}
GPU = "gpu:GPU-1"


def iso(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def window(
    number: int,
    kind: WindowKind = WindowKind.PROMPT,
    *,
    request_id: str | None = "r-1",
    measurement_id: int | None = 7,
    begun_s: float = BEGUN_S,
    seconds: float = 2.0,
    joules: float | None = 100.0,
    label: str | None = None,
    process: str = "process 1",
    units: int | None = 50,
    grams: bool = True,
    flags: tuple[str, ...] = (),
    **more: Any,
) -> EnergyWindow:
    """A window of so many joules. ``grams``: its emissions are known; ``more`` goes into its record."""
    known = joules is not None and grams
    o_g = joules / 3.6e6 * 329.7 if joules is not None and grams else None
    m_g = 37.5 * seconds / 3600 if grams else None
    score = (o_g + m_g) / units if o_g is not None and m_g is not None and units else None
    label = label or ("measured" if joules is not None else "unavailable")
    estimate = label == "modeled"
    detail = {
        "reserved_s": seconds,
        "score": {
            "value": score,
            "low": score * 0.5 if score is not None and estimate else None,
            "high": score * 2 if score is not None and estimate else None,
            "method": label,
        },
        "unit": "output_token",
        "units": units,
        "tokens": {"prompt": 10, "cached": 0, "output": units},
        "words": 40,
        "energy": {"total_j": joules, "low_j": None, "high_j": None},
        "grid": GRID if known else None,
        "embodied": EMBODIED if grams else None,
        "pue": 1.2,
        "methods": METHODS | {"E": label},
        "boundary": [GPU, "package-0"],
        "gpus": ["GPU-1"],
        "flags": list(flags),
        **more,
    }
    return EnergyWindow(
        window_id=f"{process}-{number}",
        kind=kind,
        wrapper_id="a-0",
        request_id=request_id,
        measurement_id=measurement_id,
        begun_s=begun_s,
        ended_s=begun_s + seconds,
        total_j=joules,
        o_g=o_g,
        m_g=m_g,
        label=label,
        detail=canonical_json(detail),
    )


def kept(*windows: EnergyWindow) -> list[KeptWindow]:
    return [KeptWindow(each, "gpu-1", "default") for each in windows]


def request(request_id: str, model: str, seq: int = 1, **more: Any) -> Request:
    llmconfig = canonical_json({"model": model})
    return Request(request_id, 7, seq, LLMSpec(model, "text-generation"), llmconfig, machine_id="gpu-1", **more)


def an_experiment(measurement_id: int = 7) -> MeasurementReport:
    """Two LLMs on one machine: of the first all was measured, of the second the CPU is an estimate; and one hole."""
    numbers, at_s = count(1), BEGUN_S
    windows = []
    for request_id, joules, label in (("r-1", 90.0, "measured"), ("r-2", 140.0, "modeled")):
        windows.append(
            window(next(numbers), WindowKind.LOAD, request_id=request_id, begun_s=at_s, seconds=20, joules=2500.0)
        )
        at_s += 20
        begun_s, lease_j = at_s, 0.0
        for n in range(8):
            used_j = joules + 5 * (n % 4)
            lease_j += used_j + 60
            about: dict[str, Any] = {"request_id": request_id}
            windows.append(window(next(numbers), begun_s=at_s, joules=used_j, label=label, **about))
            about |= {"begun_s": at_s + 2, "seconds": 1, "joules": 60.0, "units": 0}
            windows.append(window(next(numbers), WindowKind.IDLE, **about))
            at_s += 3
        about = {"request_id": request_id, "begun_s": begun_s, "seconds": 24, "label": label, "units": 400}
        windows.append(window(next(numbers), WindowKind.LEASE, joules=lease_j, **about))
    windows.append(window(next(numbers), request_id="r-2", begun_s=at_s, joules=None, flags=("too_short",)))
    requests = [request("r-1", "org/small"), request("r-2", "org/large", 2)]
    return report_of(Measurement(measurement_id, 1, created_s=BEGUN_S), requests, kept(*windows), iso)
