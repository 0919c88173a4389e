"""The energy windows of a wrapper process: numbered, and kept until the registry has stored them."""

from __future__ import annotations

from collections import deque
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter

from deployments.energy.figures import Energy
from registry.contract.messages import LeaseGrant, StartedFor
from registry.contract.windows import (
    ComponentRecord,
    EnergyRecord,
    EnergyWindow,
    LeaseUse,
    PromptUse,
    WindowDetail,
    WindowIds,
)
from registry.wire.labels import Label
from registry.wire.words import WindowKind

SCHEMA = 2
"""Version of the records; records without this key are version 1."""
KEPT_WINDOWS = 20_000
"""Windows that can wait for the registry, about 2 kB each; older ones are dropped, counted and reported."""
WINDOWS_A_REPORT = 500
"""Most windows in one report. With one report per second, no record is lost at up to this many prompts per second."""
_DETAIL = TypeAdapter(WindowDetail)
_USE = TypeAdapter[PromptUse | LeaseUse](PromptUse | LeaseUse)
_ENERGY = tuple(field.name for field in fields(EnergyRecord))
_COMPONENT = tuple(field.name for field in fields(ComponentRecord))


class EnergyLog:
    """The windows of one process, in the order of their numbers. ``dropped`` counts those not fetched in time."""

    def __init__(self, wrapper_id: str, process: str) -> None:
        self.dropped = 0
        self.process = process
        self._wrapper_id = wrapper_id
        self._last = 0
        self._windows: deque[EnergyWindow] = deque()

    def __len__(self) -> int:
        return len(self._windows)

    def next_ids(self, payer: LeaseGrant | StartedFor | None, window_id: str | None = None) -> WindowIds:
        """Return the ids of the next window; if ``window_id`` is None, a new id is made from its number.

        ``payer``: the lease, or the request that an LLM was started for; None if there is none.
        """
        return WindowIds(
            window_id=window_id or f"{self.process}-{self._last + 1}",
            wrapper_id=self._wrapper_id,
            request_id=None if payer is None else payer.request_id,
            measurement_id=None if payer is None else payer.measurement_id,
            process=self.process,
            number=self._last + 1,
        )

    def write(self, kind: WindowKind, ids: WindowIds, detail: WindowDetail, begun_s: float, ended_s: float) -> None:
        """Keep the window with the next ids; its start and end are UTC seconds."""
        self._last += 1
        self._windows.append(
            EnergyWindow(
                window_id=ids.window_id,
                kind=kind,
                wrapper_id=ids.wrapper_id,
                request_id=ids.request_id,
                measurement_id=ids.measurement_id,
                begun_s=begun_s,
                ended_s=ended_s,
                total_j=detail.energy.total_j,
                o_g=detail.o_g,
                m_g=detail.m_g,
                label=detail.energy.label or Label.UNAVAILABLE,
                number=ids.number,
                detail=detail_json(detail),
            )
        )
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


def detail_json(detail: WindowDetail) -> str:
    """Return the record of a window as JSON. Pydantic is seven times as fast as ``json``; prompts wait for it."""
    record = _DETAIL.dump_json(detail, exclude={"use"})
    if detail.use is not None:
        record = record[:-1] + b"," + _USE.dump_json(detail.use)[1:]
    return record.decode()


def energy_json(energy: Energy) -> dict[str, Any]:
    """Return an energy as in records, as plain JSON."""
    found = {name: getattr(energy, name) for name in _ENERGY}
    found["components"] = parts = [{name: getattr(part, name) for name in _COMPONENT} for part in energy.components]
    for part in parts:
        part["flags"] = list(part["flags"])
    return found


def as_iso(time_s: float) -> str:
    """Return a UTC second as ISO 8601."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="microseconds")
