"""Energy windows for tests, in the form in which a wrapper reports them, and a small experiment with some windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from typing import Any

from registry.accounting import report
from registry.accounting.report import Gathered, MeasurementReport
from registry.accounting.window_report import window_report
from registry.accounting.windows import KeptWindow
from registry.contract.windows import EnergyWindow
from registry.core.records import LLMSpec, Measurement, Request
from registry.wire.words import WindowKind, canonical_json

BEGUN_S = 1_800_000_000.0
GRID = {"value": 329.7, "unit": "gCO2eq/kWh", "zone": "DEU", "dataset": "ecologits", "version": "0.11.1"}
FULL_GRID = GRID | {"year": 2023, "source": "ADEME Base Empreinte", "low": 280.0, "high": 380.0}
"""A grid as in a record of schema 2. ``low`` and ``high`` are None if the range of the intensity is not known."""
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
    """Return a window with these joules and a record of schema 1, which wrappers wrote before schema 2 (`record`).

    ``grams``: whether its emissions are known. ``more``: further keys of its record.
    """
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
        number=number,
    )


def record(
    number: int,
    kind: WindowKind = WindowKind.PROMPT,
    *,
    request_id: str | None = "r-1",
    measurement_id: int | None = 7,
    begun_s: float = BEGUN_S,
    seconds: float = 2.0,
    joules: float | None = 100.0,
    resolution_j: float = 2.0,
    systematic_j: float = 0.5,
    label: str = "measured",
    counter_label: str | None = None,
    process: str = "process 1",
    units: int | None = 50,
    grid: Mapping[str, Any] | None = FULL_GRID,
    embodied: Mapping[str, Any] | None = EMBODIED,
    flags: tuple[str, ...] = (),
    **more: Any,
) -> EnergyWindow:
    """Return a window with a full record of schema 2, as a wrapper writes it. Its figures are consistent.

    A GPU used nine tenths of the ``joules``, the CPU the rest. ``resolution_j`` is half the width of their range.
    ``more`` replaces keys of the record: ``warmup``, ``status``, ``in_flight``, ``tokens``, ``counted``, ``units`` …
    """
    label = label if joules is not None else "unavailable"
    counter_label = counter_label or label
    units = units if kind in {WindowKind.PROMPT, WindowKind.LEASE} else 0
    emissions = _emissions(joules, resolution_j, seconds, units, label, grid, embodied)
    energy = _energy(joules, resolution_j, systematic_j, label, counter_label)
    detail = {
        "schema": 2,
        "kind": kind.value,
        "ids": {
            "window_id": f"{process}-p{number}" if kind is WindowKind.PROMPT else f"{process}-{number}",
            "wrapper_id": "a-0",
            "request_id": request_id,
            "measurement_id": measurement_id,
            "process": process,
            "number": number,
        },
        "begun": _utc(begun_s),
        "ended": _utc(begun_s + seconds),
        "duration_s": seconds,
        "reserved_s": seconds,
        "energy": energy,
        **emissions,
        "unit": "output_token",
        "units": units,
        "grid": grid,
        "embodied": embodied,
        "pue": 1.0,
        "boundary": [GPU, "package-0"],
        "gpus": ["GPU-1"],
        "flags": sorted(flags),
        **_of_its_kind(kind, process, begun_s, seconds, energy, emissions, units),
        **more,
    }
    return EnergyWindow(
        window_id=detail["ids"]["window_id"],
        kind=kind,
        wrapper_id="a-0",
        request_id=request_id,
        measurement_id=measurement_id,
        begun_s=begun_s,
        ended_s=begun_s + seconds,
        total_j=joules,
        o_g=detail["o_g"],
        m_g=detail["m_g"],
        label=label,
        detail=canonical_json(detail),
        number=number,
    )


def _utc(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="microseconds")


def _energy(
    joules: float | None, resolution_j: float, systematic_j: float, label: str, counter_label: str
) -> dict[str, Any]:
    """Return the energy of two components. Ranges and systematic errors are divided in proportion to the joules."""

    def figures(name: str, part: float) -> dict[str, Any]:
        known = joules is not None
        return {
            name: part * joules if joules is not None else None,
            "low_j": part * (joules - resolution_j) if joules is not None else None,
            "high_j": part * (joules + resolution_j) if joules is not None else None,
            "resolution_j": part * resolution_j if known else None,
            "systematic_j": part * systematic_j if known else None,
            "label": label,
            "counter_label": counter_label,
        }

    components = [
        {"name": name, "source": source, **figures("joules", part), "flags": []}
        for name, source, part in ((GPU, "NVML energy counter", 0.9), ("package-0", "RAPL", 0.1))
    ]
    return {**figures("total_j", 1.0), "components": components}


def _emissions(
    joules: float | None,
    resolution_j: float,
    seconds: float,
    units: int | None,
    label: str,
    grid: Mapping[str, Any] | None,
    embodied: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return operational and embodied grams, each with low and high, and the score computed from them."""

    def operational(joules: float | None, name: str) -> float | None:
        intensity = None if grid is None else grid[name] or grid["value"]
        return None if joules is None or intensity is None else joules / 3.6e6 * intensity

    def embodied_of(name: str) -> float | None:
        return None if embodied is None else embodied[name] * seconds / 3600

    def sci(o_g: float | None, m_g: float | None) -> float | None:
        return (o_g + m_g) / units if o_g is not None and m_g is not None and units else None

    low_j, high_j = (None, None) if joules is None else (joules - resolution_j, joules + resolution_j)
    grams = {
        "o_g": operational(joules, "value"),
        "o_low_g": operational(low_j, "low"),
        "o_high_g": operational(high_j, "high"),
        "m_g": embodied_of("g_per_hour"),
        "m_low_g": embodied_of("low_g_per_hour"),
        "m_high_g": embodied_of("high_g_per_hour"),
    }
    methods = {
        "E": label,
        "I": "unavailable" if grid is None else "sourced",
        "M": "unavailable" if embodied is None else "sourced",
        "R": "unavailable" if units is None else "measured",
    }
    order = ("measured", "measured_sampled", "sourced", "modeled", "simulated", "unavailable")
    score = {
        "value": sci(grams["o_g"], grams["m_g"]),
        "low": sci(grams["o_low_g"], grams["m_low_g"]),
        "high": sci(grams["o_high_g"], grams["m_high_g"]),
        "method": max(methods.values(), key=order.index),
    }
    return {**grams, "score": score, "methods": methods}


def _of_its_kind(
    kind: WindowKind,
    process: str,
    begun_s: float,
    seconds: float,
    energy: Mapping[str, Any],
    emissions: Mapping[str, Any],
    units: int | None,
) -> dict[str, Any]:
    """Return the keys that only records of this kind have."""
    about: dict[str, Any] = {"model": "org/small"}
    tokens = {"prompt": 10, "cached": 0, "output": units}
    if kind is WindowKind.PROMPT:
        return about | {
            "endpoint": "process_prompt",
            "answer_id": "chatcmpl-1",
            "prompt_id": None,
            "tokens": tokens,
            "words": 40,
            "warmup": False,
            "status": "answered",
            "in_flight": {"max": 1, "mean": 1.0},
        }
    if kind is not WindowKind.LEASE:
        return about
    return about | {
        "process": process,
        "lease_begun": _utc(begun_s),
        "prompts": 1,
        "warmups": 0,
        "tokens": tokens,
        "tokens_unknown_prompts": 0,
        "words": 40,
        "units_unknown_prompts": 0,
        "counted": {
            "begun": _utc(begun_s),
            "ended": _utc(begun_s + seconds),
            "seconds": seconds,
            **{name: energy[name] for name in ("total_j", "low_j", "high_j", "systematic_j")},
            "label": energy["counter_label"],
            **{name: grams for name, grams in emissions.items() if name.endswith("_g")},
            "prompts": 1,
            "output_tokens": units,
            "units": units,
            "in_flight": {"max": 1, "mean": 1.0},
            "flags": [],
        },
    }


def kept(*windows: EnergyWindow) -> list[KeptWindow]:
    return [KeptWindow(each, "gpu-1", "default") for each in windows]


def request(request_id: str, model: str, seq: int = 1, **more: Any) -> Request:
    llmconfig = canonical_json({"model": model})
    return Request(request_id, 7, seq, LLMSpec(model, "text-generation"), llmconfig, machine_id="gpu-1", **more)


def report_of(
    measurement: Measurement, requests: Sequence[Request], windows: Sequence[KeptWindow], iso: Callable[[float], str]
) -> MeasurementReport:
    """Return a measurement's report with all its windows, as a client that reads all pages gets it."""
    gathered = Gathered(requests, iso)
    gathered.add(windows)
    by_id = {each.request_id: each for each in requests}
    told = tuple(window_report(each, by_id.get(each.window.request_id or ""), iso) for each in windows)
    return replace(report.report_of(measurement, gathered), windows=told)


def an_experiment(measurement_id: int = 7) -> MeasurementReport:
    """Return the report of ``experiment_rows``, with all windows."""
    return report_of(*experiment_rows(measurement_id), iso)


def experiment_rows(measurement_id: int = 7) -> tuple[Measurement, list[Request], list[KeptWindow]]:
    """Return two LLMs on one machine, one of whose leases has a hole.

    The energy of the first LLM is measured, and the CPU's part of the second one's is an estimate.
    """
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
    return Measurement(measurement_id, 1, created_s=BEGUN_S), requests, list(kept(*windows))
