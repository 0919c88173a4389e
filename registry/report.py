"""The report of a measurement, in the shape of the Green Software Foundation's: score, boundary, methods … Pure.

The records are the wire as it is (``GET /measurements/{id}/report``): names as in its JSON, times ISO 8601 UTC. What is
not known is None, and a ``reason`` beside it says why; a sum with a hole is not known either. Energy is in joules,
emissions in gCO2eq.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, median, stdev
from typing import Any, Final

from registry.state import KeptWindow, Measurement, Request, WindowKind
from registry.totals import LABELS, Total, sum_of, total_of, worst

HOW: Final = "computed with the SCI formula: ((E * I) + M) per R"
SCOPE: Final = (
    "the hardware that a wrapper reserves on its LLM Machine, from the hand-over of each LLM to its release, and each "
    "start of an LLM apart; times the site's PUE. Not inside: the network, the client, the registry's own machine"
)
COUNTED: Final = {"active": WindowKind.PROMPT} | {
    kind.value: kind for kind in (WindowKind.IDLE, WindowKind.LEASE, WindowKind.LOAD, WindowKind.WAKE)
}
"""Kinds of costs, by their names in a report. Active and idle are inside lease; load and wake are not."""

_METHODS: Final = ("measured", "measured_sampled", "sourced", "modeled", "simulated", "unavailable")
_NOT_COVERED: Final = "_not_covered"
_NORMAL_975: Final = 1.959964
_T_975: Final = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""97.5 % points of Student's t for 1 to 9 degrees of freedom; beyond, the series in ``t_975`` is good to 0.0002."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with its range (None where nothing has one) and the label of the energy in it."""

    value: float | None
    low: float | None
    high: float | None
    unit: str
    label: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Spread:
    """How the figures of single prompts lie. ``n`` of them are known, ``unknown`` are not and are left out.

    ``ci95_low`` and ``ci95_high`` are the 95 % confidence interval of the mean, by Student's t, for prompts that are
    independent of each other. It and ``stdev`` take two figures.
    """

    unit: str
    n: int
    unknown: int
    mean: float | None
    median: float | None
    stdev: float | None
    ci95_low: float | None
    ci95_high: float | None
    min: float | None
    max: float | None
    label: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Cost:
    """What the windows of one kind cost together; ``seconds`` is the time that they had for their own."""

    windows: int
    seconds: float
    joules: float | None
    o_g: float | None
    m_g: float | None
    label: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Coefficient:
    """A factor of the formula that was not measured here. ``source`` is where it is from, as the operator says it."""

    name: str
    value: float | None
    unit: str
    source: str | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class LLMReport:
    """One LLM with one set of arguments. ``score`` is of its prompts; ``lease_score`` has the idle time in it, too."""

    llm: str
    requestIds: tuple[str, ...]
    modelRevisions: tuple[str, ...]
    llmconfig: Mapping[str, Any]
    prompts: int
    units: int | None
    score: Figure
    lease_score: Figure
    score_per_prompt: Spread
    joules_per_token: Spread
    costs: Mapping[str, Cost]


@dataclass(frozen=True, slots=True)
class WindowReport:
    """One window; ``detail`` is the whole record, as its wrapper made it.

    ``seconds`` is from its begin to its end, ``reserved_s`` its own share of that time: prompts at the same time share
    theirs, and idle time has prompts in between.
    """

    window: str
    kind: str
    requestId: str | None
    llm: str | None
    machine: str | None
    wrapper: str
    begunAt: str
    endedAt: str
    seconds: float
    reserved_s: float | None
    joules: float | None
    low_j: float | None
    high_j: float | None
    label: str
    o_g: float | None
    m_g: float | None
    sci_score: float | None
    sci_low: float | None
    sci_high: float | None
    unit: str | None
    units: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    words: int | None
    flags: tuple[str, ...]
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MeasurementReport:
    """Answer of GET /measurements/{measurementId}/report.

    ``boundary`` names the parts whose energy is inside, ``not_covered`` those that nothing counts. ``methods`` say of
    E, I, M and R whether they are measured, modeled, sourced or unavailable, the worst of all windows. ``flags`` are
    the measurement's own, ``window_flags`` say how many windows have which.
    """

    measurementId: int
    how: str
    scope: str
    createdAt: str
    machines: tuple[str, ...]
    gpu_uuids: tuple[str, ...]
    flags: tuple[str, ...]
    window_flags: Mapping[str, int]
    versions: Mapping[str, str] | None
    boundary: tuple[str, ...]
    not_covered: tuple[str, ...]
    methods: Mapping[str, str]
    coefficients: tuple[Coefficient, ...]
    llms: tuple[LLMReport, ...]
    costs: Mapping[str, Cost]
    windows: tuple[WindowReport, ...]


def report_of(
    measurement: Measurement, requests: Sequence[Request], kept: Sequence[KeptWindow], iso: Callable[[float], str]
) -> MeasurementReport:
    """The report of a measurement from its windows (in the order in which they began). ``iso`` writes a UTC second."""
    by_id = {request.request_id: request for request in requests}
    windows = tuple(_window(each, by_id.get(each.window.request_id or ""), iso) for each in kept)
    flags = Counter(flag for window in windows for flag in window.flags)
    details = [window.detail for window in windows]
    return MeasurementReport(
        measurementId=measurement.measurement_id,
        how=HOW,
        scope=SCOPE,
        createdAt=iso(measurement.created_s),
        machines=_once(window.machine for window in windows) or _once(request.machine_id for request in requests),
        gpu_uuids=_once(uuid for detail in details for uuid in _list(detail, "gpus")),
        flags=measurement.flags,
        window_flags=dict(flags.most_common()),
        versions=None if measurement.versions is None else json.loads(measurement.versions),
        boundary=_once(name for detail in details for name in _list(detail, "boundary")),
        not_covered=tuple(sorted(flag.removesuffix(_NOT_COVERED) for flag in flags if flag.endswith(_NOT_COVERED))),
        methods={letter: _worst_method(_of(detail, "methods").get(letter) for detail in details) for letter in "EIMR"},
        coefficients=_coefficients(details),
        llms=_llms(requests, windows),
        costs=_costs(windows),
        windows=windows,
    )


def t_975(degrees: int) -> float:
    """The 97.5 % point of Student's t distribution, degrees of freedom ≥ 1.

    Source: Abramowitz and Stegun 26.7.5, the expansion around the normal distribution.
    """
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = _NORMAL_975
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def spread(figures: Sequence[float | None], unit: str, label: str, reason: str | None) -> Spread:
    """How these figures lie. ``reason``: why some are not known, None where all are."""
    known = [figure for figure in figures if figure is not None]
    if not known:
        nothing = (None,) * 7
        return Spread(unit, 0, len(figures), *nothing, LABELS[-1], reason)
    mean = fmean(known)
    deviation = stdev(known) if len(known) > 1 else None
    half = None if deviation is None else t_975(len(known) - 1) * deviation / sqrt(len(known))
    return Spread(
        unit=unit,
        n=len(known),
        unknown=len(figures) - len(known),
        mean=mean,
        median=median(known),
        stdev=deviation,
        ci95_low=None if half is None else mean - half,
        ci95_high=None if half is None else mean + half,
        min=min(known),
        max=max(known),
        label=label,
        reason=reason,
    )


# --- windows ------------------------------------------------------------------------------------------------


def _window(kept: KeptWindow, request: Request | None, iso: Callable[[float], str]) -> WindowReport:
    window = kept.window
    detail = json.loads(window.detail)
    energy, score, tokens = _of(detail, "energy"), _of(detail, "score"), _of(detail, "tokens")
    return WindowReport(
        window=window.window_id,
        kind=window.kind.value,
        requestId=window.request_id,
        llm=None if request is None else request.spec.model,
        machine=kept.machine_id,
        wrapper=window.wrapper_id,
        begunAt=iso(window.begun_s),
        endedAt=iso(window.ended_s),
        seconds=window.ended_s - window.begun_s,
        reserved_s=_number(detail, "reserved_s"),
        joules=window.total_j,
        low_j=_number(energy, "low_j"),
        high_j=_number(energy, "high_j"),
        label=window.label,
        o_g=window.o_g,
        m_g=window.m_g,
        sci_score=_number(score, "value"),
        sci_low=_number(score, "low"),
        sci_high=_number(score, "high"),
        unit=detail.get("unit"),
        units=detail.get("units"),
        prompt_tokens=tokens.get("prompt"),
        cached_tokens=tokens.get("cached"),
        output_tokens=tokens.get("output"),
        words=detail.get("words"),
        flags=tuple(_list(detail, "flags")),
        detail=detail,
    )


def _of(detail: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a record, empty where a wrapper had nothing to say."""
    return detail.get(name) or {}


def _list(detail: Mapping[str, Any], name: str) -> list[str]:
    return detail.get(name) or []


def _number(detail: Mapping[str, Any], name: str) -> float | None:
    value = detail.get(name)
    return None if value is None else float(value)


def _once(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _kind(windows: Iterable[WindowReport], kind: WindowKind) -> list[WindowReport]:
    return [window for window in windows if window.kind == kind]


# --- sums ---------------------------------------------------------------------------------------------------


def _costs(windows: Sequence[WindowReport]) -> dict[str, Cost]:
    return {name: _cost(_kind(windows, kind)) for name, kind in COUNTED.items()}


def _cost(windows: Sequence[WindowReport]) -> Cost:
    total = total_of(
        Total(sum_of([each.joules]), sum_of([each.o_g]), sum_of([each.m_g]), each.label) for each in windows
    )
    joules = total.joules.value
    return Cost(
        windows=len(windows),
        seconds=sum(window.seconds if window.reserved_s is None else window.reserved_s for window in windows),
        joules=joules,
        o_g=total.o_g.value,
        m_g=total.m_g.value,
        label=LABELS[-1] if joules is None else total.label,
        reason=_why(windows, lambda each: None in (each.joules, each.o_g, each.m_g), "lack joules or gCO2eq"),
    )


def _why(windows: Sequence[WindowReport], lacks: Callable[[WindowReport], bool], what: str) -> str | None:
    """Why a sum is not known, by the flags of the windows that make the hole; None where there is no hole."""
    if not windows:
        return "there are no such windows"
    holes = [window for window in windows if lacks(window)]
    if not holes:
        return None
    flags = Counter(flag for window in holes for flag in window.flags)
    because = f" ({', '.join(flag for flag, _ in flags.most_common(5))})" if flags else ""
    return f"{len(holes)} of {len(windows)} windows {what}{because}"


# --- LLMs ---------------------------------------------------------------------------------------------------


def _llms(requests: Sequence[Request], windows: Sequence[WindowReport]) -> tuple[LLMReport, ...]:
    """One report for each different llmconfig, in the order in which they were asked for."""
    alike: dict[str, list[Request]] = {}
    for request in requests:
        alike.setdefault(request.llmconfig, []).append(request)
    return tuple(_llm(group, windows) for group in alike.values())


def _llm(requests: Sequence[Request], windows: Sequence[WindowReport]) -> LLMReport:
    ids = {request.request_id for request in requests}
    own = [window for window in windows if window.requestId in ids]
    prompts = _kind(own, WindowKind.PROMPT)
    label = worst(prompt.label for prompt in prompts if prompt.joules is not None)
    unit = next((prompt.unit for prompt in prompts if prompt.unit is not None), "unit")
    per_unit = f"gCO2eq/{unit}"
    units = sum_of([prompt.units for prompt in prompts]).value
    return LLMReport(
        llm=requests[0].spec.model,
        requestIds=tuple(request.request_id for request in requests),
        modelRevisions=_once(request.model_revision for request in requests),
        llmconfig=json.loads(requests[0].llmconfig),
        prompts=len(prompts),
        units=None if units is None else int(units),
        score=_score(prompts, unit, per_unit),
        lease_score=_score(_kind(own, WindowKind.LEASE), unit, per_unit),
        score_per_prompt=spread(
            [prompt.sci_score if _has_score(prompt, unit) else None for prompt in prompts],
            per_unit,
            label,
            _why(prompts, lambda each: not _has_score(each, unit), f"have no score in {per_unit}"),
        ),
        joules_per_token=spread(
            [_joules_per_token(prompt) for prompt in prompts],
            "J/output_token",
            label,
            _why(prompts, lambda each: _joules_per_token(each) is None, "lack joules or output tokens"),
        ),
        costs=_costs(own),
    )


def _has_score(window: WindowReport, unit: str) -> bool:
    """False too for a score in another functional unit: the configuration was changed between two prompts."""
    return window.sci_score is not None and bool(window.units) and window.unit == unit


def _joules_per_token(window: WindowReport) -> float | None:
    return None if window.joules is None or not window.output_tokens else window.joules / window.output_tokens


def _score(windows: Sequence[WindowReport], unit: str, per_unit: str) -> Figure:
    """What a unit caused in all of these windows: the mean of their scores, weighted by their units."""
    reason = _why(windows, lambda each: not _has_score(each, unit), f"have no score in {per_unit}")
    if reason is not None:
        return Figure(None, None, None, per_unit, LABELS[-1], reason)
    units = sum(window.units or 0 for window in windows)

    def mean(of: Callable[[WindowReport], float | None]) -> float:
        return sum((of(window) or 0.0) * (window.units or 0) for window in windows) / units

    has_range = any(window.sci_low is not None for window in windows)
    return Figure(
        value=mean(lambda each: each.sci_score),
        low=mean(lambda each: each.sci_score if each.sci_low is None else each.sci_low) if has_range else None,
        high=mean(lambda each: each.sci_score if each.sci_high is None else each.sci_high) if has_range else None,
        unit=per_unit,
        label=worst(window.label for window in windows),
        reason=None,
    )


# --- how it was done ----------------------------------------------------------------------------------------


def _worst_method(words: Iterable[str | None]) -> str:
    """The worst of these words; ``unavailable`` for none, and for one that says nothing."""
    return max((word if word in _METHODS else _METHODS[-1] for word in words), key=_METHODS.index, default=_METHODS[-1])


def _coefficients(details: Iterable[Mapping[str, Any]]) -> tuple[Coefficient, ...]:
    """The factors that the windows were reckoned with, each different one once."""
    found = []
    for detail in details:
        grid, embodied = _of(detail, "grid"), _of(detail, "embodied")
        if grid:
            words = " ".join(str(grid[name]) for name in ("dataset", "version", "zone") if grid.get(name) is not None)
            found.append(Coefficient("I: grid intensity", _number(grid, "value"), "gCO2eq/kWh", words))
        if detail.get("pue") is not None:
            found.append(Coefficient("E: PUE", _number(detail, "pue"), "1", "the operator's configuration"))
        if embodied:
            low, high = _number(embodied, "low_g_per_hour"), _number(embodied, "high_g_per_hour")
            per_hour, source = _number(embodied, "g_per_hour"), embodied.get("source")
            found.append(Coefficient("M: embodied carbon", per_hour, "gCO2eq/h reserved", source, low, high))
    return tuple(dict.fromkeys(found))
