"""The report of a measurement, structured as the Green Software Foundation asks: score, boundary, methods … Pure.

As in ``GET /measurements/{id}/report``, times are ISO 8601 UTC, energy is in joules, emissions are in gCO2eq. Unknown
values are None, with a ``reason`` beside them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from registry.accounting.figures import MachineFigures, figures_of, of_kind, why
from registry.accounting.totals import same, sum_of
from registry.accounting.window_report import WindowReport, row_of
from registry.accounting.windows import KeptWindow
from registry.contract.windows import WindowJSON, record_of
from registry.core.records import Measurement, Request
from registry.wire.labels import Label, label_of, worst, worst_word
from registry.wire.words import RequestStatus, WindowKind

HOW: Final = "computed with the SCI formula: ((E * I) + M) per R"
SCOPE: Final = (
    "the hardware that a wrapper reserves on its LLM Machine, from an LLM's hand-over to its release, and, separately, "
    "during its start; energy times the site's PUE. Not included: network, client, the registry's own machine"
)
COUNTED: Final = {"active": WindowKind.PROMPT} | {
    kind.value: kind for kind in (WindowKind.IDLE, WindowKind.LEASE, WindowKind.LOAD, WindowKind.WAKE)
}
"""Kinds of costs, by their names in a report. Lease is active plus idle, without load and wake."""

CLOCK_S: Final = 0.1
"""Shortest `Hole` reported of an ended lease, seconds: shorter ones may be a difference of two machines' clocks."""

DRIFT: Final = 1e-4
"""Allowed drift between the two clocks, as a fraction of the lease's length. That time is added to CLOCK_S."""

RUNNING_S, RUNNING_SHARE = 1.0, 0.01
"""Shortest hole reported of a running lease: the longer of RUNNING_S seconds and this fraction of its length."""

WRAPPER_DIED: Final = "wrapper_died"
END_NOT_RECORDED: Final = "end_not_recorded"
WINDOWS_MISSING: Final = "windows_missing"

_NOT_COVERED: Final = "_not_covered"


@dataclass(frozen=True, slots=True)
class Cost:
    """Sum of the known cost of all windows of one kind; None if nothing is known.

    * ``seconds``: sum of the windows' shares of time, including those with unknown joules.
    * ``low_j`` … ``m_high_g``: bounds of the known part. ``label``: worst label of the known joules.
    * ``missing``: number of windows without known joules; ``missing_s``: seconds of these and of the holes.
    * ``missing_o``, ``missing_m``, ``missing_g``: windows whose operational, embodied or total emissions are unknown.
    * ``lost``: True if some time is in no window (`Hole`), so that joules and emissions are not the total.
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
    lost: bool = False
    missing_o: int = 0
    missing_m: int = 0


@dataclass(frozen=True, slots=True)
class Hole:
    """Time of a lease that is in no window: its energy is unknown.

    ``reason``: ``wrapper_died``; ``end_not_recorded``: the wrapper died, or its last windows have not arrived yet;
    ``windows_missing``: windows were dropped.
    """

    requestId: str
    seconds: float
    reason: str

    @property
    def text(self) -> str:
        """The hole as text: how much time of which request is in no window, and why."""
        if self.seconds < CLOCK_S:
            return f"some time of {self.requestId} may be in no window ({self.reason})"
        return f"{self.seconds:.3g} s of {self.requestId} are in no window ({self.reason})"


@dataclass(frozen=True, slots=True)
class Coefficient:
    """A factor of the formula that was not measured. ``source``: where it comes from."""

    name: str
    value: float | None
    unit: str
    source: str | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class LLMReport:
    """One LLM with one set of arguments. ``figures``: one per machine, as different machines are not comparable."""

    llm: str
    requestIds: tuple[str, ...]
    modelRevisions: tuple[str, ...]
    llmconfig: Mapping[str, Any]
    figures: tuple[MachineFigures, ...]
    costs: Mapping[str, Cost]


@dataclass(frozen=True, slots=True)
class MeasurementReport:
    """Answer of GET /measurements/{measurementId}/report.

    * ``running``: requests whose lease has not ended, so that more windows will come.
    * ``windows``: empty in answers, as there may be many; GET /measurements/{measurementId}/windows returns them.
    * ``boundary``: parts whose energy is included; ``not_covered``: parts without an energy counter.
    * ``methods``: label of E, I, M and R (measured, modeled, sourced, unavailable), the worst of all windows.
    * ``flags``: those of the measurement; ``window_flags``: number of windows with each flag.
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
    windows: tuple[WindowReport, ...] = ()


class _Row(NamedTuple):
    """A window as clients see it (``told``) with its exact times, UTC seconds, since ``told`` has rounded times.

    ``from_hand_over``: False for a lease window whose process got the lease after the hand-over.
    """

    begun_s: float
    ended_s: float
    told: WindowReport
    from_hand_over: bool


class Gathered:
    """Collects what a report needs of a measurement's windows, page by page.

    Keeps a row of some 1.5 KB per window, because intervals need single prompts. The record of the window
    is not kept: it takes ten times as much memory.
    """

    def __init__(self, requests: Iterable[Request], iso: Callable[[float], str]) -> None:
        """Begin without windows. ``requests``: all requests of the measurement. ``iso`` formats UTC seconds."""
        self.rows: list[_Row] = []
        self.boundary: dict[str, None] = {}
        self.gpu_uuids: dict[str, None] = {}
        self.methods: dict[str, Label] = {}
        self.coefficients: dict[Coefficient, None] = {}
        self.requests = {request.request_id: request for request in requests}
        self.iso = iso

    def add(self, kept: Iterable[KeptWindow]) -> None:
        """Add the next page of windows, sorted by start time."""
        for each in kept:
            window, record = each.window, record_of(each.window)
            told = row_of(each, record, self.requests.get(window.request_id or ""), self.iso)
            self.boundary |= dict.fromkeys(record.get("boundary") or ())
            self.gpu_uuids |= dict.fromkeys(record.get("gpus") or ())
            self.coefficients |= dict.fromkeys(_coefficients(record))
            methods = record.get("methods") or {}
            for letter in "EIMR":
                so_far = self.methods.get(letter, Label.MEASURED)
                self.methods[letter] = worst((so_far, label_of(methods.get(letter))))
            begun = record.get("lease_begun")
            self.rows.append(_Row(window.begun_s, window.ended_s, told, begun in (None, record.get("begun"))))


def report_of(measurement: Measurement, gathered: Gathered) -> MeasurementReport:
    """Return the report of a measurement, without its windows."""
    requests = tuple(gathered.requests.values())
    windows = [row.told for row in gathered.rows]
    flags = Counter(flag for window in windows for flag in window.flags)
    rows_of: dict[str | None, list[_Row]] = {}
    for row in gathered.rows:
        rows_of.setdefault(row.told.requestId, []).append(row)
    found = (_hole(request, rows_of.get(request.request_id, ())) for request in requests)
    holes = tuple(hole for hole in found if hole is not None)
    return MeasurementReport(
        measurementId=measurement.measurement_id,
        how=HOW,
        scope=SCOPE,
        createdAt=gathered.iso(measurement.created_s),
        machines=_once(window.machine for window in windows) or _once(request.machine_id for request in requests),
        gpu_uuids=tuple(gathered.gpu_uuids),
        flags=measurement.flags,
        window_flags=dict(flags.most_common()),
        versions=None if measurement.versions is None else json.loads(measurement.versions),
        running=tuple(each.request_id for each in requests if each.deployed_s is not None and not each.status.ended),
        holes=holes,
        boundary=tuple(gathered.boundary),
        not_covered=tuple(sorted(flag.removesuffix(_NOT_COVERED) for flag in flags if flag.endswith(_NOT_COVERED))),
        methods={letter: gathered.methods.get(letter, Label.UNAVAILABLE) for letter in "EIMR"},
        coefficients=tuple(gathered.coefficients),
        llms=_llms(requests, windows, holes),
        costs=_costs(windows, holes),
    )


def _once(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name is not None))


# --- sums ---------------------------------------------------------------------------------------------------


def _costs(windows: Sequence[WindowReport], holes: Sequence[Hole]) -> dict[str, Cost]:
    costs = {name: _cost(of_kind(windows, kind)) for name, kind in COUNTED.items() if kind is not WindowKind.LEASE}
    lease = _lease_cost(windows, holes)
    active, idle = costs["active"], costs["idle"]
    costs |= {"active": _inside(active, idle, lease), "idle": _inside(idle, active, lease)}
    return {name: costs.get(name, lease) for name in COUNTED}


def _inside(part: Cost, rest: Cost, lease: Cost) -> Cost:  # D92: parts of a lease are inside its bounds
    """Return the cost of ``part`` (prompts or idle time of the leases) with narrower bounds.

    Part and rest add up to the lease, whose bounds are narrower. So the part is at least low(lease) - high(rest).
    """
    bounds: dict[str, Any] = {}
    for name, low, high in (
        ("joules", "low_j", "high_j"),
        ("o_g", "o_low_g", "o_high_g"),
        ("m_g", "m_low_g", "m_high_g"),
    ):
        mine, others, whole = ([getattr(cost, each) for each in (name, low, high)] for cost in (part, rest, lease))
        if None in (*mine, *others, *whole) or not same(mine[0] + others[0], whole[0]):
            continue
        bounds[low] = max(mine[1], min(mine[0], whole[1] - others[2]))
        bounds[high] = min(mine[2], max(mine[0], whole[2] - others[1]))
    return replace(part, **bounds)


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
        label=worst_word(window.label for window in known_j),
        missing=len(windows) - len(known_j),
        missing_s=sum(_own_s(window) for window in windows if window.joules is None),
        missing_g=sum(None in (window.o_g, window.m_g) for window in windows),
        reason=reason,
        missing_o=len(windows) - len(known_o),
        missing_m=len(windows) - len(known_m),
    )


def _lease_cost(windows: Sequence[WindowReport], holes: Sequence[Hole]) -> Cost:
    """Return the cost of leases: prompts plus idle time, with the bounds of complete lease windows (`_sharpest`)."""
    parts = _held(windows)
    cost = _cost(parts)
    with_holes = {hole.requestId for hole in holes}
    by_request: dict[str | None, list[WindowReport]] = {}
    for window in parts + of_kind(windows, WindowKind.LEASE):
        by_request.setdefault(window.requestId, []).append(window)
    sharpest = [
        window
        for request_id, own in by_request.items()
        for window in (_held(own) if request_id in with_holes else _sharpest(own))
    ]
    lost = [hole.text for hole in holes]
    return replace(
        _cost(sharpest),
        windows=cost.windows,
        seconds=cost.seconds,
        missing=cost.missing,
        missing_s=cost.missing_s + sum(hole.seconds for hole in holes),
        missing_g=cost.missing_g,
        missing_o=cost.missing_o,
        missing_m=cost.missing_m,
        lost=bool(holes),
        reason="; ".join([cost.reason, *lost] if cost.reason else lost) or None,
    )


def _held(windows: Sequence[WindowReport]) -> list[WindowReport]:
    return of_kind(windows, WindowKind.PROMPT) + of_kind(windows, WindowKind.IDLE)


def _sharpest(own: Sequence[WindowReport]) -> Sequence[WindowReport]:
    """Return the lease window of a lease if it covers exactly its prompts and idle time; else these parts.

    The bounds of a lease window are narrower, because it is read from the counters as one window.
    """
    parts, leases = _held(own), of_kind(own, WindowKind.LEASE)
    if len(leases) != 1 or any(_lacks(window) for window in leases):
        return parts
    one_process = {part.process for part in parts} == {leases[0].process}
    return leases if one_process and same(_sum(parts, "joules"), leases[0].joules) else parts


def _lacks(window: WindowReport) -> bool:
    return None in (window.joules, window.o_g, window.m_g)


def _own_s(window: WindowReport) -> float:
    return window.seconds if window.reserved_s is None else window.reserved_s


def _sum(windows: Sequence[WindowReport], name: str) -> float | None:
    return sum_of(getattr(window, name) for window in windows).value


# --- what is lost -------------------------------------------------------------------------------------------


def _hole(request: Request, own: Sequence[_Row]) -> Hole | None:
    """Return the time of a lease that is in none of its windows, None if there is none.

    Of a running lease, only the time until the end of its last idle or lease window counts: an idle window is recorded
    when it ends, so later idle time will still arrive. The last windows of a wrapper process that died are lost, so a
    lease with several processes always has a hole.
    """
    held = [row for row in own if row.told.kind in {WindowKind.PROMPT, WindowKind.IDLE}]
    leases = [row for row in own if row.told.kind == WindowKind.LEASE]
    if request.ended_s is None:
        closing = max((row.ended_s for row in held + leases if row.told.kind != WindowKind.PROMPT), default=0.0)
        held = [row for row in held if row.begun_s < closing]
    length_s = _length_s(request, held, leases)
    if length_s is None:
        return None
    seconds = length_s - sum(_own_s(row.told) for row in held) - _restarted_s(own, held)
    died = len({row.told.process for row in held + leases}) > 1 or not all(row.from_hand_over for row in leases)
    least_s = CLOCK_S + DRIFT * length_s if request.status.ended else max(RUNNING_S, RUNNING_SHARE * length_s)
    if seconds <= least_s and not died:
        return None
    reason = WINDOWS_MISSING
    if died or request.status is RequestStatus.FAILED:
        reason = WRAPPER_DIED
    elif request.status.ended and not leases:
        reason = END_NOT_RECORDED
    return Hole(request.request_id, max(0.0, seconds), reason)


def _length_s(request: Request, held: Sequence[_Row], leases: Sequence[_Row]) -> float | None:
    """Return the length of a lease so far, seconds; None if it has not begun, or has no windows yet.

    An expired lease ends on its wrapper first, so the length of its lease windows counts if that is shorter.
    """
    if request.deployed_s is None:
        return None
    if request.ended_s is None:
        last_s = max((row.ended_s for row in held), default=None)
        return None if last_s is None else last_s - request.deployed_s
    length_s = request.ended_s - request.deployed_s
    if request.status is RequestStatus.EXPIRED and leases and all(row.from_hand_over for row in leases):
        return min(length_s, sum(row.told.seconds for row in leases))
    return length_s


def _restarted_s(own: Sequence[_Row], held: Sequence[_Row]) -> float:
    """Return how long restarts of the LLM took during its lease, seconds by the wrapper's clock."""
    begun_s = min((row.begun_s for row in held), default=0.0)
    ended_s = max((row.ended_s for row in held), default=0.0)
    starts = [row for row in own if row.told.kind in {WindowKind.LOAD, WindowKind.WAKE}]
    return sum(max(0.0, min(start.ended_s, ended_s) - max(start.begun_s, begun_s)) for start in starts)


# --- LLMs ---------------------------------------------------------------------------------------------------


def _llms(requests: Sequence[Request], windows: Sequence[WindowReport], holes: Sequence[Hole]) -> tuple[LLMReport, ...]:
    """Return one report per llmconfig, in the order of the first request for it."""
    alike: dict[str, list[Request]] = {}
    for request in requests:
        alike.setdefault(request.llmconfig, []).append(request)
    llmconfigs = {request.request_id: request.llmconfig for request in requests}
    windows_of: dict[str | None, list[WindowReport]] = {}
    for window in windows:
        windows_of.setdefault(llmconfigs.get(window.requestId or ""), []).append(window)
    holes_of: dict[str, list[Hole]] = {}
    for hole in holes:
        holes_of.setdefault(llmconfigs[hole.requestId], []).append(hole)
    return tuple(_llm(group, windows_of.get(llm, ()), holes_of.get(llm, ())) for llm, group in alike.items())


def _llm(requests: Sequence[Request], own: Sequence[WindowReport], holes: Sequence[Hole]) -> LLMReport:
    return LLMReport(
        llm=requests[0].spec.model,
        requestIds=tuple(request.request_id for request in requests),
        modelRevisions=_once(request.model_revision for request in requests),
        llmconfig=json.loads(requests[0].llmconfig),
        figures=figures_of(own),
        costs=_costs(own, holes),
    )


# --- how it was done ----------------------------------------------------------------------------------------


def _coefficients(record: WindowJSON) -> Iterator[Coefficient]:
    """Yield the factors that a window was computed with."""
    grid, embodied, pue = record.get("grid"), record.get("embodied"), record.get("pue")
    if grid:
        dated = " ".join(str(word) for word in map(grid.get, ("source", "dataset", "version", "zone", "year")) if word)
        yield Coefficient(
            "I: grid intensity", grid.get("value"), "gCO2eq/kWh", dated, grid.get("low"), grid.get("high")
        )
    if pue is not None:
        yield Coefficient("E: PUE", pue, "1", "the operator's configuration")
    if embodied:
        bounds = embodied.get("low_g_per_hour"), embodied.get("high_g_per_hour")
        per_hour, source = embodied.get("g_per_hour"), embodied.get("source")
        yield Coefficient("M: embodied carbon", per_hour, "gCO2eq/h reserved", source, *bounds)
