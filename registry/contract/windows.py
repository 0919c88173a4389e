"""Energy windows: what a wrapper measured during a period of time, and the record of it. Pure.

A wrapper writes the record once, as JSON. The registry stores this text and returns it unchanged, so
the fields of `WindowDetail` are the keys of the record, in its order. `WindowJSON` has only the keys
that the registry reads. Records of other versions are accepted: keys may be missing or unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from registry.wire.words import WindowKind


@dataclass(frozen=True, slots=True)
class EnergyWindow:
    """Energy and emissions of a time window on a wrapper, measured by the wrapper.

    * ``window_id``: ``<process>-<number>``, or ``<process>-p<n>`` for the n-th prompt of the wrapper's process. A
      prompt's id is known when the prompt starts, so its answer can contain it.
    * ``number``: position in the log of its process, from 1, without gaps; 0 if read back from the database.
    * ``request_id``, ``measurement_id``: those of the lease, None without one.
    * ``begun_s``, ``ended_s``: UTC seconds.
    * ``total_j`` [J], ``o_g`` and ``m_g`` [gCO2eq]: None if not known.
    * ``label``: label of the energy (registry.wire.labels.Label).
    * ``detail``: the whole record (`WindowDetail`), a JSON object.
    """

    window_id: str
    kind: WindowKind
    wrapper_id: str
    request_id: str | None
    measurement_id: int | None
    begun_s: float
    ended_s: float
    total_j: float | None
    o_g: float | None
    m_g: float | None
    label: str
    detail: str
    number: int = field(default=0, compare=False)


# --- the record of a window ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ComponentRecord:
    """The energy of one part of the machine, J, between its bounds; None: not known.

    ``name``: ``gpu:<uuid>``, ``package-<n>``, ``dram-<n>`` or ``cpu-model``. ``source``: how it was obtained, in words.
    ``counter_label``: label of the counter, before its reading was divided. ``resolution_j``: bound of
    the error due to the counter's steps. ``systematic_j``: part of the error that has the same sign in
    similar windows.
    """

    name: str
    source: str | None
    label: str | None = None
    counter_label: str | None = None
    joules: float | None = None
    low_j: float | None = None
    high_j: float | None = None
    resolution_j: float | None = None
    systematic_j: float | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EnergyRecord:
    """The energy of a window, J: the sum of its components (`ComponentRecord`), with their worst label.

    None: not known.
    """

    total_j: float | None = None
    low_j: float | None = None
    high_j: float | None = None
    resolution_j: float | None = None
    systematic_j: float | None = None
    label: str | None = None
    counter_label: str | None = None
    components: tuple[ComponentRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class GridRecord:
    """The carbon intensity that was used: ``value`` in ``unit``, its range, and where it comes from."""

    value: float | None
    unit: str | None
    zone: str | None
    dataset: str | None
    version: str | None
    year: int | None
    source: str | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class EmbodiedRecord:
    """The embodied carbon that was used, gCO2eq per hour of reservation, with its range and its source."""

    g_per_hour: float | None
    low_g_per_hour: float | None
    high_g_per_hour: float | None
    source: str | None


@dataclass(frozen=True, slots=True)
class ScoreRecord:
    """The SCI score, gCO2eq per functional unit, with its range; ``method``: the worst label of its terms."""

    value: float | None
    low: float | None
    high: float | None
    method: str | None


@dataclass(frozen=True, slots=True)
class WindowIds:
    """Ids of a window: its wrapper, process and request, and its ``number`` in the log of that process."""

    window_id: str
    wrapper_id: str
    request_id: str | None
    measurement_id: int | None
    process: str
    number: int


@dataclass(frozen=True, slots=True)
class TokensRecord:
    """Numbers of tokens; None: not known. ``cached``: prompt tokens that were not computed again."""

    prompt: int | None
    cached: int | None
    output: int | None


@dataclass(frozen=True, slots=True)
class InFlight:
    """Number of prompts answered at the same time: maximum, and mean over the window."""

    max: int | None
    mean: float | None


@dataclass(frozen=True, slots=True)
class CountedRecord:
    """Figures of a lease without its warm-up, read from the counters as one window (the counted stretch).

    The stretch lasts from the start of the first prompt that is no warm-up to the end of the last prompt;
    ``begun`` and ``ended`` are ISO 8601. ``seconds`` leaves out LLM starts. ``prompts``,
    ``output_tokens`` and ``units`` are without warm-ups.
    """

    begun: str | None
    ended: str | None
    seconds: float
    total_j: float | None
    low_j: float | None
    high_j: float | None
    systematic_j: float | None
    label: str
    o_g: float | None
    o_low_g: float | None
    o_high_g: float | None
    m_g: float | None
    m_low_g: float | None
    m_high_g: float | None
    prompts: int | None
    output_tokens: int | None
    units: int | None
    in_flight: InFlight
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PromptUse:
    """The fields that only the record of a prompt window has, in addition to `WindowDetail`.

    ``answer_id``: vLLM's id of the answer. ``prompt_id``: the client's id of the prompt. ``words``: of the answer.
    ``status``: answered, refused, cut or failed.
    """

    endpoint: str | None
    answer_id: str | None
    prompt_id: str | None
    tokens: TokensRecord | None
    words: int | None
    warmup: bool | None
    status: str | None
    in_flight: InFlight


@dataclass(frozen=True, slots=True)
class LeaseUse:
    """The fields that only the record of a lease window has, in addition to `WindowDetail`.

    ``process``: process of the wrapper. ``lease_begun``: start of the lease, ISO 8601; earlier than the
    window if an earlier process of the wrapper had the lease. ``tokens``, ``words`` and the window's
    units are sums over the prompts for which they are known.
    """

    process: str | None
    lease_begun: str | None
    prompts: int | None
    warmups: int | None
    tokens: TokensRecord | None
    tokens_unknown_prompts: int | None
    words: int | None
    units_unknown_prompts: int | None
    counted: CountedRecord | None


# D104: the record is typed
@dataclass(frozen=True, slots=True, kw_only=True)
class WindowDetail:
    """The record of a window. In JSON, the keys of ``use`` follow those of the window, on the same level.

    * ``pue``: power usage effectiveness of the site. ``schema``: version of the record, None: version 1.
    * ``begun``, ``ended``: ISO 8601. ``duration_s``: from start to end; ``reserved_s``: the window's share of that
      time, which prompts in flight at the same time divide among them.
    * ``o_g`` … ``m_high_g``: operational and embodied emissions, gCO2eq, with their bounds.
    * ``methods``: label of the SCI terms E, I, M and R.
    * ``boundary``: names of the parts whose energy is included; ``gpus``: UUIDs of those that are GPUs.
    * ``model``: the LLM. ``use``: fields of this kind of window only; None for idle time and LLM starts.
    """

    grid: GridRecord | None
    embodied: EmbodiedRecord | None
    pue: float | None
    schema: int | None
    ids: WindowIds | None
    kind: str | None
    begun: str | None
    ended: str | None
    duration_s: float | None
    reserved_s: float | None
    energy: EnergyRecord
    o_g: float | None
    o_low_g: float | None
    o_high_g: float | None
    m_g: float | None
    m_low_g: float | None
    m_high_g: float | None
    unit: str | None
    units: int | None
    score: ScoreRecord
    methods: Mapping[str, str]
    flags: tuple[str, ...]
    boundary: tuple[str, ...]
    gpus: tuple[str, ...]
    model: str | None
    use: PromptUse | LeaseUse | None = None


# --- reading records ----------------------------------------------------------------------------------------
# Types of the JSON objects, with only the keys that are read. To build dataclasses from all keys was too slow.


class ComponentJSON(TypedDict, total=False):
    """A `ComponentRecord` as JSON."""

    name: str
    joules: float | None


class EnergyJSON(TypedDict, total=False):
    """An `EnergyRecord` as JSON."""

    low_j: float | None
    high_j: float | None
    resolution_j: float | None
    systematic_j: float | None
    counter_label: str | None
    components: Sequence[ComponentJSON]


class GridJSON(TypedDict, total=False):
    """A `GridRecord` as JSON."""

    value: float | None
    zone: str | None
    dataset: str | None
    version: str | None
    year: int | None
    source: str | None
    low: float | None
    high: float | None


class EmbodiedJSON(TypedDict, total=False):
    """An `EmbodiedRecord` as JSON."""

    g_per_hour: float | None
    low_g_per_hour: float | None
    high_g_per_hour: float | None
    source: str | None


class ScoreJSON(TypedDict, total=False):
    """A `ScoreRecord` as JSON."""

    value: float | None
    low: float | None
    high: float | None


class TokensJSON(TypedDict, total=False):
    """A `TokensRecord` as JSON."""

    prompt: int | None
    cached: int | None
    output: int | None


class InFlightJSON(TypedDict, total=False):
    """An `InFlight` as JSON."""

    max: int | None
    mean: float | None


class UseJSON(TypedDict, total=False):
    """The fields that only the records of prompts (`PromptUse`) and leases (`LeaseUse`) have, as JSON."""

    answer_id: str | None
    prompt_id: str | None
    tokens: TokensJSON | None
    words: int | None
    warmup: bool | None
    status: str | None
    in_flight: InFlightJSON
    lease_begun: str | None
    counted: Mapping[str, Any] | None


class WindowJSON(UseJSON, total=False):
    """A `WindowDetail` as JSON."""

    grid: GridJSON | None
    embodied: EmbodiedJSON | None
    pue: float | None
    begun: str | None
    reserved_s: float | None
    energy: EnergyJSON | None
    o_low_g: float | None
    o_high_g: float | None
    m_low_g: float | None
    m_high_g: float | None
    unit: str | None
    units: int | None
    score: ScoreJSON | None
    methods: Mapping[str, str]
    flags: Sequence[str]
    boundary: Sequence[str]
    gpus: Sequence[str]


def record_of(window: EnergyWindow) -> WindowJSON:
    """Return the record of a window, with all its keys. A value may be None where `WindowDetail` allows it."""
    record: WindowJSON = json.loads(window.detail)
    return record


def read_counted(record: Mapping[str, Any]) -> CountedRecord:
    """Return the counted stretch of a lease from its JSON object."""
    values: dict[str, Any] = {name: record.get(name) for name in CountedRecord.__slots__}
    in_flight = record.get("in_flight") or {}
    values["in_flight"] = InFlight(in_flight.get("max"), in_flight.get("mean"))
    values["flags"] = tuple(record.get("flags") or ())
    return CountedRecord(**values)


def counter_label_of(window: EnergyWindow) -> str | None:
    """Return the label of the counters that a window's energy was read from; None: not recorded."""
    return (record_of(window).get("energy") or {}).get("counter_label")
