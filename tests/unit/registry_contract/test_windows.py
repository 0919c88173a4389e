"""The record of an energy window, read back as a type."""

from __future__ import annotations

import json

import pytest

from registry.contract.windows import (
    CountedRecord,
    EnergyWindow,
    GridRecord,
    InFlight,
    LeaseUse,
    PromptUse,
    TokensRecord,
    WindowDetail,
    read_counted,
    read_detail,
)
from registry.wire.words import WindowKind
from tests.support.energy_windows import record, window


def detail_of(row: EnergyWindow) -> WindowDetail:
    """The record of a window."""
    return read_detail(row.kind, json.loads(row.detail))


@pytest.mark.parametrize("kind", WindowKind)
def test_a_record_is_read_as_a_type(kind: WindowKind) -> None:
    """Every key of a record of each kind is a field, at its place in the JSON; numbers are floats."""
    row = record(1, kind)
    detail, keys = detail_of(row), json.loads(row.detail)
    assert (detail.energy.total_j, detail.energy.components[0].joules) == (100.0, 90.0)
    assert detail.grid == GridRecord(329.7, "gCO2eq/kWh", "DEU", "ecologits", "0.11.1", 2023, "ADEME Base Empreinte", 280.0, 380.0)  # fmt: skip # noqa: E501
    fields = {*WindowDetail.__slots__, *(() if detail.use is None else type(detail.use).__slots__)} - {"use"}
    assert fields == keys.keys()
    assert {name: str(getattr(detail, name, None)) for name in ("kind", "unit", "model", "begun")} == {
        name: keys[name] for name in ("kind", "unit", "model", "begun")
    }


def test_what_a_kind_adds() -> None:
    """A prompt has its tokens and status, a lease the sums of its prompts and its counted stretch; a start has none."""
    prompt, lease, load = (
        detail_of(record(1, kind)).use for kind in (WindowKind.PROMPT, WindowKind.LEASE, WindowKind.LOAD)
    )
    assert isinstance(prompt, PromptUse)
    assert (prompt.tokens, prompt.status, prompt.in_flight) == (TokensRecord(10, 0, 50), "answered", InFlight(1, 1.0))
    assert isinstance(lease, LeaseUse)
    assert isinstance(lease.counted, CountedRecord)
    assert (lease.prompts, lease.counted.seconds, lease.counted.in_flight) == (1, 2.0, InFlight(1, 1.0))
    assert load is None


def test_records_of_other_versions_are_read() -> None:
    """What a record lacks is None or empty, and keys that are not known here are ignored."""
    empty = read_detail(WindowKind.PROMPT, {"of the future": 1, "energy": None, "tokens": None})
    assert (empty.grid, empty.embodied, empty.ids, empty.pue, empty.flags, empty.methods) == (
        None,
        None,
        None,
        None,
        (),
        {},
    )
    assert (empty.energy.total_j, empty.energy.components, empty.score.value) == (None, (), None)
    assert empty.use == PromptUse(None, None, None, None, None, None, None, InFlight(None, None))
    old = detail_of(window(1, WindowKind.LEASE))
    assert (old.schema, old.energy.low_j, old.use and old.use.words) == (None, None, 40)
    assert read_counted({"seconds": 3, "flags": ["a"], "new": 1}).seconds == 3.0
