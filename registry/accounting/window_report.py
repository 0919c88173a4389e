"""One energy window as clients see it: flat, so that it also fits a row of a table. Pure.

Records of earlier versions are accepted; fields that they lack are None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from registry.accounting.totals import SPENT, sum_of
from registry.accounting.windows import KeptWindow
from registry.contract.windows import EnergyJSON, EnergyWindow, UseJSON, WindowJSON, record_of
from registry.core.records import Request
from registry.wire.labels import Label, label_of, worst
from registry.wire.words import WindowKind

_USED: Final = frozenset({WindowKind.PROMPT, WindowKind.LEASE})
_PARTS: Final = {"gpu_j": ("gpu:",), "cpu_j": ("package-", "cpu-"), "dram_j": ("dram-",)}


@dataclass(frozen=True, slots=True)
class WindowReport:
    """One window; None: not known or not applicable.

    * ``adds_up``: False for a lease window, which repeats its prompts and idle time; only the others may be added.
    * ``seconds``: from start to end; windows may overlap, so these do not add up.
    * ``reserved_s``: the window's share of that time, which adds up. Prompts in flight at the same time divide the time
      among them; idle windows leave out the prompts in between.
    * ``joules``: between ``low_j`` and ``high_j``. ``resolution_j``: bound of the error due to the counter's steps.
      ``systematic_j``: part of the error that has the same sign in similar windows. ``gpu_j``, ``cpu_j``, ``dram_j``,
      ``other_j``: joules by kind of component.
    * ``label``: label of the joules; ``counter_label``: label of the counters, before any sharing.
    * ``sci_method``: worst label of the SCI terms E, I, M and R.
    * ``status``: answered, refused, cut or failed.
    * ``in_flight_max``, ``in_flight_mean``: number of prompts answered at the same time.
    * ``prompt``: the client's id of the prompt; ``answer_id``: vLLM's id of the answer.
    * ``counted``: in lease windows, the use from the start of the first prompt after the warm-up to the end of the
      last prompt, read from the counters as one window.
    * ``detail``: the whole record of the wrapper, None in a report; a page of windows contains it only on request.
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
    adds_up: bool
    reserved_s: float | None = None
    joules: float | None = None
    low_j: float | None = None
    high_j: float | None = None
    resolution_j: float | None = None
    systematic_j: float | None = None
    label: str = Label.UNAVAILABLE
    counter_label: str | None = None
    gpu_j: float | None = None
    cpu_j: float | None = None
    dram_j: float | None = None
    other_j: float | None = None
    o_g: float | None = None
    o_low_g: float | None = None
    o_high_g: float | None = None
    m_g: float | None = None
    m_low_g: float | None = None
    m_high_g: float | None = None
    grid: float | None = None
    grid_low: float | None = None
    grid_high: float | None = None
    sci_score: float | None = None
    sci_low: float | None = None
    sci_high: float | None = None
    sci_method: str = Label.UNAVAILABLE
    unit: str | None = None
    units: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    words: int | None = None
    warmup: bool | None = None
    status: str | None = None
    in_flight_max: int | None = None
    in_flight_mean: float | None = None
    prompt: str | None = None
    answer_id: str | None = None
    flags: tuple[str, ...] = ()
    counted: Mapping[str, Any] | None = None
    detail: Mapping[str, Any] | None = None

    @property
    def process(self) -> str:
        """The wrapper process that measured it."""
        return process_of(self.window)


@dataclass(frozen=True, slots=True)
class WindowsPage:
    """Answer of GET /measurements/{measurementId}/windows. ``next``: the ``after`` of the next page, None: last page.

    Sorted by start time. The window of a long prompt is stored late: it may belong to a page that was read before.
    """

    windows: tuple[WindowReport, ...]
    next: str | None


def window_report(kept: KeptWindow, request: Request | None, iso: Callable[[float], str]) -> WindowReport:
    """Return a window as clients see it. ``request``: its request, if any. ``iso`` formats UTC seconds."""
    record = record_of(kept.window)
    return row_of(kept, record, request, iso, detail=record)


def row_of(
    kept: KeptWindow,
    record: WindowJSON,
    request: Request | None,
    iso: Callable[[float], str],
    *,
    detail: WindowJSON | None = None,
) -> WindowReport:
    """Return a window as clients see it, from its record. ``detail``: passed on unchanged."""
    window = kept.window
    energy, score, grid = record.get("energy") or {}, record.get("score") or {}, record.get("grid") or {}
    use: UseJSON = record if window.kind in _USED else {}
    prompt: UseJSON = record if window.kind is WindowKind.PROMPT else {}
    tokens, in_flight = use.get("tokens") or {}, prompt.get("in_flight") or {}
    methods = record.get("methods") or {}
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
        adds_up=window.kind in SPENT,
        reserved_s=record.get("reserved_s"),
        joules=window.total_j,
        low_j=energy.get("low_j"),
        high_j=energy.get("high_j"),
        resolution_j=energy.get("resolution_j"),
        systematic_j=energy.get("systematic_j"),
        label=window.label,
        counter_label=energy.get("counter_label"),
        **_parts(energy),
        **_emissions(window, record),
        grid=grid.get("value"),
        grid_low=grid.get("low"),
        grid_high=grid.get("high"),
        sci_score=score.get("value"),
        sci_low=score.get("low"),
        sci_high=score.get("high"),
        sci_method=_worst_method(tuple(map(methods.get, "EIMR"))),
        unit=record.get("unit"),
        units=record.get("units"),
        prompt_tokens=tokens.get("prompt"),
        cached_tokens=tokens.get("cached"),
        output_tokens=tokens.get("output"),
        words=use.get("words"),
        warmup=prompt.get("warmup"),
        status=prompt.get("status"),
        in_flight_max=in_flight.get("max"),
        in_flight_mean=in_flight.get("mean"),
        prompt=prompt.get("prompt_id"),
        answer_id=prompt.get("answer_id"),
        flags=tuple(record.get("flags") or ()),
        counted=record.get("counted"),
        detail=detail,
    )


@cache
def _worst_method(words: tuple[str | None, ...]) -> Label:
    return worst(map(label_of, words))


def process_of(window_id: str) -> str:
    """Return the id of the wrapper process that created this window."""
    return window_id.rpartition("-")[0]


def _emissions(window: EnergyWindow, record: WindowJSON) -> dict[str, float | None]:
    """Return operational (O) and embodied (M) emissions with their ranges, gCO2eq."""
    return {
        "o_g": window.o_g,
        "o_low_g": record.get("o_low_g"),
        "o_high_g": record.get("o_high_g"),
        "m_g": window.m_g,
        "m_low_g": record.get("m_low_g"),
        "m_high_g": record.get("m_high_g"),
    }


def _parts(energy: EnergyJSON) -> dict[str, float | None]:
    """Return the joules by kind of component; None if there is none, or one of them is not known."""
    parts: dict[str, list[float | None]] = {name: [] for name in (*_PARTS, "other_j")}
    for component in energy.get("components") or ():
        named = component["name"]
        kind = next((name for name, begins in _PARTS.items() if named.startswith(begins)), "other_j")
        parts[kind].append(component.get("joules"))
    return {name: sum_of(joules).value for name, joules in parts.items()}


def held_windows(windows: Iterable[WindowReport]) -> list[WindowReport]:
    """Return for each lease the lease window if it is complete, else its prompt and idle windows.

    Counters are less exact for short idle windows than for a whole lease. A lease window covers a single
    process, so it is complete only if the lease had one process.
    """
    of_lease: dict[str | None, list[WindowReport]] = {}
    for window in windows:
        if window.kind in {WindowKind.PROMPT, WindowKind.IDLE, WindowKind.LEASE}:
            of_lease.setdefault(window.requestId, []).append(window)
    held = []
    for own in of_lease.values():
        leases = [window for window in own if window.kind == WindowKind.LEASE]
        known = len(leases) == 1 and leases[0].joules is not None and leases[0].units is not None
        whole = known and len({process_of(window.window) for window in own}) == 1
        held += leases if whole else [window for window in own if window.kind != WindowKind.LEASE]
    return held
