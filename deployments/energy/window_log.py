"""The energy windows of a wrapper process: numbered, and kept until the registry has stored them."""

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
from registry.contract.windows import EnergyWindow
from registry.wire.words import WindowKind

SCHEMA = 2
"""Version of the records; records without this key are version 1."""
KEPT_WINDOWS = 20_000
"""Windows that can wait for the registry, about 2 kB each; older ones are dropped, counted and reported."""
WINDOWS_A_REPORT = 500
"""With one report per second: as many prompts per second can go on for ever without loss of a record."""
_DETAIL = TypeAdapter(dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A finished window before it gets a number.

    ``window_id`` is None if it has none yet. Start and end are UTC seconds, ``duration_s`` is by the monotonic clock.
    ``payer`` is the lease, or the request that an LLM was started for; None if there is none.
    ``more`` has what its kind adds to a record, or replaces in it: tokens, words, endpoint, model.
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
    """The windows of one process, in the order of their numbers. ``dropped`` counts those not fetched in time.

    Values that all windows have in common (grid, embodied carbon, PUE) are given once.
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
        """Number a window and keep it."""
        self._last += 1
        self._windows.append(self._window(record, self._last))
        if len(self._windows) > KEPT_WINDOWS:
            self._windows.popleft()
            self.dropped += 1

    def oldest(self) -> tuple[EnergyWindow, ...]:
        """Return the windows that the registry must store next, at most WINDOWS_A_REPORT."""
        return tuple(self._windows[index] for index in range(min(len(self._windows), WINDOWS_A_REPORT)))

    # D38: windows are sent until they are stored
    def confirm(self, number: int) -> None:
        """Drop all windows up to this number: the registry has stored them. Idempotent; a lower one has no effect."""
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
            detail=_DETAIL.dump_json(detail).decode(),  # seven times as fast as json; prompts wait for it
        )


def as_json(energy: Energy) -> dict[str, Any]:
    """Return an energy with its components as plain JSON."""
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
            for part in energy.components  # by hand: asdict is too slow for the prompt path
        ],
    }


def as_iso(time_s: float) -> str:
    """Return a UTC second as ISO 8601."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="microseconds")
