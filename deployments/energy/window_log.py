"""The energy windows of a wrapper's process: numbered, and kept until the registry has written them down."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter

from deployments.energy.figures import Embodied, Energy, GridIntensity
from deployments.energy.sci import Score
from registry.contract.messages import LeaseGrant, StartedFor
from registry.core.records import EnergyWindow, WindowKind

SCHEMA = 2
"""Of the records; 1 is that of records without this key."""
KEPT_WINDOWS = 20_000
"""Windows that wait for the registry; older ones are dropped, counted and told. Some 2 kB each."""
WINDOWS_A_REPORT = 500
"""With a report a second: as many prompts a second can go on for ever, and none of their records is lost."""
_DETAIL = TypeAdapter(dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A finished window, as it is before it has a number.

    ``window_id`` is None if it has none yet. Begin and end are UTC seconds, ``duration_s`` is by the monotonic clock.
    ``payer`` is the lease, or the request that an LLM was started for, None without one.
    ``more`` is what its kind has besides, and in place of what all have: tokens, words, endpoint, model.
    """

    kind: WindowKind
    window_id: str | None
    payer: LeaseGrant | StartedFor | None
    begun_s: float
    ended_s: float
    duration_s: float
    energy: Energy
    score: Score
    flags: Sequence[str]
    more: Mapping[str, Any]


class EnergyLog:
    """The windows of one process, in the order of their numbers. ``dropped`` counts those that nobody fetched in time.

    What is the same in all of them (grid, embodied carbon, PUE) is given once.
    """

    def __init__(
        self, wrapper_id: str, process: str, *, grid: GridIntensity | None, embodied: Embodied | None, pue: float
    ) -> None:
        self.dropped = 0
        self.process = process
        self._wrapper_id = wrapper_id
        self._given = {
            "grid": None
            if grid is None
            else {
                "value": grid.gco2eq_per_kwh,
                "unit": "gCO2eq/kWh",
                "zone": grid.zone,
                "dataset": grid.dataset,
                "version": grid.version,
                "year": grid.year,
                "source": grid.source,
                "low": grid.low,
                "high": grid.high,
            },
            "embodied": None if embodied is None else asdict(embodied),
            "pue": pue,
        }
        self._last = 0
        self._windows: deque[EnergyWindow] = deque()

    def __len__(self) -> int:
        return len(self._windows)

    def write(self, record: Record) -> None:
        """Give a window its number, and keep it."""
        self._last += 1
        self._windows.append(self._window(record, self._last))
        if len(self._windows) > KEPT_WINDOWS:
            self._windows.popleft()
            self.dropped += 1

    def oldest(self) -> tuple[EnergyWindow, ...]:
        """Those that are to be written down next."""
        return tuple(self._windows[index] for index in range(min(len(self._windows), WINDOWS_A_REPORT)))

    def confirm(self, number: int) -> None:
        """All windows up to this number are written down. Again, or an older one: no difference."""
        first = self._last - len(self._windows) + 1
        for _ in range(min(number, self._last) - first + 1):
            self._windows.popleft()

    def _window(self, record: Record, number: int) -> EnergyWindow:
        payer, score = record.payer, record.score
        window_id = record.window_id or f"{self.process}-{number}"
        request_id = None if payer is None else payer.request_id
        measurement_id = None if payer is None else payer.measurement_id
        detail = {
            **self._given,
            "schema": SCHEMA,
            "ids": {
                "window_id": window_id,
                "wrapper_id": self._wrapper_id,
                "request_id": request_id,
                "measurement_id": measurement_id,
                "process": self.process,
                "number": number,
            },
            "kind": record.kind.value,
            "begun": as_iso(record.begun_s),
            "ended": as_iso(record.ended_s),
            "duration_s": record.duration_s,
            "reserved_s": score.duration_s,
            "energy": as_json(record.energy),
            "o_g": score.o_g,
            "o_low_g": score.o_low_g,
            "o_high_g": score.o_high_g,
            "m_g": score.m_g,
            "m_low_g": score.m_low_g,
            "m_high_g": score.m_high_g,
            "unit": score.unit,
            "units": score.units,
            "score": {"value": score.sci_score, "low": score.low, "high": score.high, "method": score.method.value},
            "methods": dict(score.methods),
            "flags": sorted(set(record.flags)),
            "boundary": list(score.boundary),
            "gpus": [name.removeprefix("gpu:") for name in score.boundary if name.startswith("gpu:")],
            **record.more,
        }
        return EnergyWindow(
            window_id=window_id,
            kind=record.kind,
            wrapper_id=self._wrapper_id,
            request_id=request_id,
            measurement_id=measurement_id,
            begun_s=record.begun_s,
            ended_s=record.ended_s,
            total_j=record.energy.total_j,
            o_g=score.o_g,
            m_g=score.m_g,
            label=record.energy.label.value,
            number=number,
            detail=_DETAIL.dump_json(detail).decode(),  # a seventh of the time that json takes, which prompts wait for
        )


def as_json(energy: Energy) -> dict[str, Any]:
    """An energy with its components, in plain JSON."""
    return {
        "total_j": energy.total_j,
        "low_j": energy.low_j,
        "high_j": energy.high_j,
        "resolution_j": energy.resolution_j,
        "systematic_j": energy.systematic_j,
        "label": energy.label.value,
        "counter_label": energy.counter_label.value,
        "components": [
            {
                "name": part.name,
                "source": part.source,
                "label": part.label.value,
                "counter_label": part.counter_label.value,
                "joules": part.joules,
                "low_j": part.low_j,
                "high_j": part.high_j,
                "resolution_j": part.resolution_j,
                "systematic_j": part.systematic_j,
                "flags": list(part.flags),
            }
            for part in energy.components  # by hand: asdict takes longer than the prompt path should
        ],
    }


def as_iso(time_s: float) -> str:
    """A UTC second as ISO 8601."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="microseconds")
