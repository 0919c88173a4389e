"""Energy windows: what a wrapper measured during a period of time, and the record of it. Pure.

A wrapper writes the record once, as JSON. The registry stores this text and returns it unchanged, so
the fields below are the keys of the record, in its order. `read_detail` parses a record. Records of
other versions are accepted: missing fields are None or empty, and unknown fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache, partial
from typing import Any, Final, NamedTuple, get_args, get_origin, get_type_hints

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
    """What the record of a prompt window has besides `WindowDetail`.

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
    """What the record of a lease window has besides `WindowDetail`.

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


# D104: one type for writer and readers
@dataclass(frozen=True, slots=True, kw_only=True)
class WindowDetail:
    """The record of a window. In JSON, the keys of ``use`` follow those of the window, on the same level.

    * ``pue``: power usage effectiveness of the site. ``schema``: version of the record, None: version 1.
    * ``begun``, ``ended``: ISO 8601. ``duration_s``: from start to end; ``reserved_s``: its share of that time.
    * ``o_g`` … ``m_high_g``: operational and embodied emissions, gCO2eq, with their bounds.
    * ``methods``: label of the SCI terms E, I, M and R.
    * ``boundary``: names of the parts whose energy is included; ``gpus``: UUIDs of those that are GPUs.
    * ``model``: the LLM. ``use``: what its kind adds; None for idle time and LLM starts.
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

_USES: Final = {WindowKind.PROMPT: PromptUse, WindowKind.LEASE: LeaseUse}


def counter_label_of(window: EnergyWindow) -> str | None:
    """Return the label of the counters that a window's energy was read from; None: not recorded.

    Reads nothing else of the record: the registry asks this of every window that is a share.
    """
    energy = json.loads(window.detail).get("energy") or {}
    label: str | None = energy.get("counter_label")
    return label


def read_detail(kind: WindowKind, record: Mapping[str, Any]) -> WindowDetail:
    """Return the record of a window of this kind from its JSON object."""
    use = _USES.get(kind)
    return WindowDetail(**_values(WindowDetail, record), use=None if use is None else use(**_values(use, record)))


def read_counted(record: Mapping[str, Any]) -> CountedRecord:
    """Return the counted stretch of a lease from its JSON object."""
    return CountedRecord(**_values(CountedRecord, record))


class _Keys(NamedTuple):
    """The keys of a type's JSON object, grouped by how their values are read; ``plain``: used unchanged."""

    plain: tuple[str, ...]
    numbers: tuple[str, ...]
    parts: tuple[tuple[str, Callable[[Any], object]], ...]


def _values(kind: Callable[..., object], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a type from its JSON object. Must be fast: a page has 1,000 windows of 90 fields."""
    keys, get = _keys(kind), record.get
    values = {name: get(name) for name in keys.plain}
    for name in keys.numbers:
        value = get(name)
        values[name] = value if value is None else float(value)
    for name, read in keys.parts:
        values[name] = read(get(name))
    return values


@cache
def _keys(kind: Callable[..., object]) -> _Keys:
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name != "use"}
    numbers = tuple(name for name, hint in hints.items() if float in (hint, *get_args(hint)))
    parts = {name: read for name, hint in hints.items() if (read := _part_reader(hint)) is not None}
    return _Keys(tuple(name for name in hints if name not in {*numbers, *parts}), numbers, tuple(parts.items()))


def _part_reader(hint: Any) -> Callable[[Any], object] | None:
    """Return a function that converts a JSON object or list (None: missing) to this type.

    Return None for types that are neither.
    """
    options = get_args(hint)
    if get_origin(hint) is tuple:
        item = _part_reader(options[0])
        return (lambda value: tuple(value or ())) if item is None else (lambda value: tuple(map(item, value or ())))
    if get_origin(hint) is Mapping:
        return lambda value: value or {}
    for kind in (hint, *options):
        if isinstance(kind, type) and is_dataclass(kind):
            return partial(_read, kind, optional=type(None) in options)
    return None


def _read(kind: Callable[..., object], value: Mapping[str, Any] | None, *, optional: bool) -> object:
    return kind(**_values(kind, value or {})) if value or not optional else None
