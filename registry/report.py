"""The report of a measurement, in the shape of the Green Software Foundation's: score, boundary, methods … Pure.

The records are the wire as it is (``GET /measurements/{id}/report``): names as in its JSON, times ISO 8601 UTC. What is
not known is None, and a ``reason`` beside it says why. Energy is in joules, emissions in gCO2eq.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from registry.figures import MachineFigures, figures_of, of_kind, why
from registry.state import KeptWindow, Measurement, Request, RequestStatus, WindowKind
from registry.totals import same, sum_of, worst
from registry.window_report import WindowReport, number, part_of, process_of, window_report, worst_method

HOW: Final = "computed with the SCI formula: ((E * I) + M) per R"
SCOPE: Final = (
    "the hardware that a wrapper reserves on its LLM Machine, from the hand-over of each LLM to its release, and each "
    "start of an LLM apart; times the site's PUE. Not inside: the network, the client, the registry's own machine"
)
COUNTED: Final = {"active": WindowKind.PROMPT} | {
    kind.value: kind for kind in (WindowKind.IDLE, WindowKind.LEASE, WindowKind.LOAD, WindowKind.WAKE)
}
"""Kinds of costs, by their names in a report. Lease is active and idle together; load and wake are apart."""

HOLE_S: Final = 1.0
"""Shortest hole that is reported, seconds: the hand-over itself takes some time that no window covers."""

HOLE_SHARE: Final = 0.01
"""The same as a share of the lease: clocks of two machines differ a little."""

WRAPPER_DIED: Final = "wrapper_died"
END_NOT_RECORDED: Final = "end_not_recorded"
WINDOWS_MISSING: Final = "windows_missing"

_NOT_COVERED: Final = "_not_covered"


@dataclass(frozen=True, slots=True)
class Cost:
    """What the windows of one kind cost together, as far as it is known; None where nothing of it is.

    ``missing`` windows, which took ``missing_s`` seconds together with the holes, have no known joules, and
    ``missing_g`` no known emissions: with them it would be more.
    ``low_j`` to ``m_high_g`` are the bounds of what is known. ``label`` is the worst of its joules. ``seconds`` is the
    time that the windows had for their own, those with unknown joules included.
    """

    windows: int
    seconds: float
    joules: float | None
    low_j: float | None
    high_j: float | None
    o_g: float | None
    o_low_g: float | None
    o_high_g: float | None
    m_g: float | None
    m_low_g: float | None
    m_high_g: float | None
    label: str
    missing: int
    missing_s: float
    missing_g: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class Hole:
    """Time of a lease that is in no window: what was used in it is lost.

    ``reason``: ``wrapper_died``; ``end_not_recorded``: its wrapper died, or its last windows have not come yet;
    ``windows_missing``: they were dropped.
    """

    requestId: str
    seconds: float
    reason: str


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
    """One LLM with one set of arguments. ``figures`` are for each machine apart, as they don't compare."""

    llm: str
    requestIds: tuple[str, ...]
    modelRevisions: tuple[str, ...]
    llmconfig: Mapping[str, Any]
    figures: tuple[MachineFigures, ...]
    costs: Mapping[str, Cost]


@dataclass(frozen=True, slots=True)
class MeasurementReport:
    """Answer of GET /measurements/{measurementId}/report.

    ``running`` are the requests whose lease has not ended: more of them will come. ``holes`` are what is lost.
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
    running: tuple[str, ...]
    holes: tuple[Hole, ...]
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
    windows = tuple(window_report(each, by_id.get(each.window.request_id or ""), iso) for each in kept)
    flags = Counter(flag for window in windows for flag in window.flags)
    details = [window.detail or {} for window in windows]
    holes = tuple(hole for request in requests if (hole := _hole(request, kept, windows)) is not None)
    return MeasurementReport(
        measurementId=measurement.measurement_id,
        how=HOW,
        scope=SCOPE,
        createdAt=iso(measurement.created_s),
        machines=_once(window.machine for window in windows) or _once(request.machine_id for request in requests),
        gpu_uuids=_once(uuid for detail in details for uuid in detail.get("gpus") or ()),
        flags=measurement.flags,
        window_flags=dict(flags.most_common()),
        versions=None if measurement.versions is None else json.loads(measurement.versions),
        running=tuple(request.request_id for request in requests if request.status is RequestStatus.DEPLOYED),
        holes=holes,
        boundary=_once(name for detail in details for name in detail.get("boundary") or ()),
        not_covered=tuple(sorted(flag.removesuffix(_NOT_COVERED) for flag in flags if flag.endswith(_NOT_COVERED))),
        methods={
            letter: worst_method(part_of(detail, "methods").get(letter) for detail in details) for letter in "EIMR"
        },
        coefficients=_coefficients(details),
        llms=_llms(requests, windows, holes),
        costs=_costs(windows, holes),
        windows=windows,
    )


def _once(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name is not None))


# --- sums ---------------------------------------------------------------------------------------------------


def _costs(windows: Sequence[WindowReport], holes: Sequence[Hole]) -> dict[str, Cost]:
    costs = {name: _cost(of_kind(windows, kind)) for name, kind in COUNTED.items() if kind is not WindowKind.LEASE}
    lease = _lease_cost(windows, holes)
    return {name: costs.get(name, lease) for name in COUNTED}


def _cost(windows: Sequence[WindowReport]) -> Cost:
    reason = why(windows, _lacks, "lack joules or gCO2eq") if windows else "there are no such windows"
    known_j = [window for window in windows if window.joules is not None]
    known_o = [window for window in windows if window.o_g is not None]
    known_m = [window for window in windows if window.m_g is not None]
    return Cost(
        windows=len(windows),
        seconds=sum(map(_own_s, windows)),
        joules=_sum(known_j, "joules"),
        low_j=_sum(known_j, "low_j"),
        high_j=_sum(known_j, "high_j"),
        o_g=_sum(known_o, "o_g"),
        o_low_g=_sum(known_o, "o_low_g"),
        o_high_g=_sum(known_o, "o_high_g"),
        m_g=_sum(known_m, "m_g"),
        m_low_g=_sum(known_m, "m_low_g"),
        m_high_g=_sum(known_m, "m_high_g"),
        label=worst(window.label for window in known_j),
        missing=len(windows) - len(known_j),
        missing_s=sum(_own_s(window) for window in windows if window.joules is None),
        missing_g=sum(None in (window.o_g, window.m_g) for window in windows),
        reason=reason,
    )


def _lease_cost(windows: Sequence[WindowReport], holes: Sequence[Hole]) -> Cost:
    """Return the sum of prompts and idle time. Lease windows that hold the same joules have sharper bounds."""
    cost = _cost(of_kind(windows, WindowKind.PROMPT) + of_kind(windows, WindowKind.IDLE))
    leases = of_kind(windows, WindowKind.LEASE)
    if same(cost.joules, _sum(leases, "joules")) and not cost.missing:
        cost = replace(
            cost,
            low_j=_sum(leases, "low_j"),
            high_j=_sum(leases, "high_j"),
            o_low_g=_sum(leases, "o_low_g"),
            o_high_g=_sum(leases, "o_high_g"),
            m_low_g=_sum(leases, "m_low_g"),
            m_high_g=_sum(leases, "m_high_g"),
            label=worst(lease.label for lease in leases),
        )
    if not holes:
        return cost
    lost = "; ".join(f"{hole.seconds:.3g} s of {hole.requestId} are in no window ({hole.reason})" for hole in holes)
    return replace(
        cost,
        missing_s=cost.missing_s + sum(hole.seconds for hole in holes),
        reason=f"{cost.reason}; {lost}" if cost.reason else lost,
    )


def _lacks(window: WindowReport) -> bool:
    return None in (window.joules, window.o_g, window.m_g)


def _own_s(window: WindowReport) -> float:
    return window.seconds if window.reserved_s is None else window.reserved_s


def _sum(windows: Sequence[WindowReport], name: str) -> float | None:
    return sum_of(getattr(window, name) for window in windows).value


# --- what is lost -------------------------------------------------------------------------------------------


def _hole(request: Request, kept: Sequence[KeptWindow], windows: Sequence[WindowReport]) -> Hole | None:
    """Return the time of a lease that is in none of its windows.

    Of a lease that runs only what is over counts, until the end of its last idle or lease window: idle time is written
    down when a stretch of it closes, so the pauses after that are still to come.
    """
    own = [
        (each.window, window)
        for each, window in zip(kept, windows, strict=True)
        if each.window.request_id == request.request_id
    ]
    begun_s, ended_s = request.deployed_s, request.ended_s
    if ended_s is None:
        closing = {WindowKind.IDLE, WindowKind.LEASE}
        ended_s = max((window.ended_s for window, _ in own if window.kind in closing), default=0.0)
        own = [(window, told) for window, told in own if window.begun_s < ended_s]
        if not own:
            return None
    if begun_s is None or ended_s is None:
        return None
    covered_s = 0.0
    for window, told in own:
        if window.kind in {WindowKind.PROMPT, WindowKind.IDLE}:
            covered_s += _own_s(told)
        elif window.kind is not WindowKind.LEASE:  # the engine was started again under the lease
            covered_s += max(0.0, min(window.ended_s, ended_s) - max(window.begun_s, begun_s))
    seconds = ended_s - begun_s - covered_s
    if seconds <= max(HOLE_S, HOLE_SHARE * (ended_s - begun_s)):
        return None
    processes = {process_of(window.window_id) for window, _ in own}
    reason = WINDOWS_MISSING
    if len(processes) > 1 or request.status is RequestStatus.FAILED:
        reason = WRAPPER_DIED
    elif request.status.ended and not any(window.kind is WindowKind.LEASE for window, _ in own):
        reason = END_NOT_RECORDED
    return Hole(request.request_id, seconds, reason)


# --- LLMs ---------------------------------------------------------------------------------------------------


def _llms(requests: Sequence[Request], windows: Sequence[WindowReport], holes: Sequence[Hole]) -> tuple[LLMReport, ...]:
    """One report for each different llmconfig, in the order in which they were asked for."""
    alike: dict[str, list[Request]] = {}
    for request in requests:
        alike.setdefault(request.llmconfig, []).append(request)
    return tuple(_llm(group, windows, holes) for group in alike.values())


def _llm(requests: Sequence[Request], windows: Sequence[WindowReport], holes: Sequence[Hole]) -> LLMReport:
    ids = {request.request_id for request in requests}
    own = [window for window in windows if window.requestId in ids]
    return LLMReport(
        llm=requests[0].spec.model,
        requestIds=tuple(request.request_id for request in requests),
        modelRevisions=_once(request.model_revision for request in requests),
        llmconfig=json.loads(requests[0].llmconfig),
        figures=figures_of(own),
        costs=_costs(own, [hole for hole in holes if hole.requestId in ids]),
    )


# --- how it was done ----------------------------------------------------------------------------------------


def _coefficients(details: Iterable[Mapping[str, Any]]) -> tuple[Coefficient, ...]:
    """The factors that the windows were reckoned with, each different one once."""
    found = []
    for detail in details:
        grid, embodied = part_of(detail, "grid"), part_of(detail, "embodied")
        if grid:
            words = ("source", "dataset", "version", "zone", "year")
            dated = " ".join(str(grid[name]) for name in words if grid.get(name) is not None)
            low, high = number(grid, "low"), number(grid, "high")
            found.append(Coefficient("I: grid intensity", number(grid, "value"), "gCO2eq/kWh", dated, low, high))
        if detail.get("pue") is not None:
            found.append(Coefficient("E: PUE", number(detail, "pue"), "1", "the operator's configuration"))
        if embodied:
            low, high = number(embodied, "low_g_per_hour"), number(embodied, "high_g_per_hour")
            per_hour, source = number(embodied, "g_per_hour"), embodied.get("source")
            found.append(Coefficient("M: embodied carbon", per_hour, "gCO2eq/h reserved", source, low, high))
    return tuple(dict.fromkeys(found))
