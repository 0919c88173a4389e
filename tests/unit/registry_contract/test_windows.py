"""The record of an energy window, as it is written and as it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest

from registry.contract import windows
from registry.contract.windows import (
    CountedRecord,
    InFlight,
    LeaseUse,
    PromptUse,
    UseJSON,
    WindowDetail,
    WindowJSON,
    counter_label_of,
    read_counted,
    record_of,
)
from registry.wire.words import WindowKind
from tests.support.energy_windows import record, window

USES = {WindowKind.PROMPT: PromptUse, WindowKind.LEASE: LeaseUse}


@pytest.mark.parametrize("kind", WindowKind)
def test_a_record_has_the_fields_of_its_type(kind: WindowKind) -> None:
    """Every key of a record of each kind is a field of WindowDetail or of what its kind adds."""
    use = USES.get(kind)
    own = () if use is None else fields(use)
    names = {field.name for field in (*fields(WindowDetail), *own)} - {"use"}
    assert json.loads(record(1, kind).detail).keys() == names


def test_what_is_read_is_what_is_written() -> None:
    """Every key that the registry reads is a field of the type that wrappers write, with the same type of value."""
    written = types_of(WindowDetail)
    for use in USES.values():
        written |= types_of(use)
    read = get_type_hints(WindowJSON)
    assert read.keys() >= get_type_hints(UseJSON).keys()
    assert {name: as_json(hint) for name, hint in read.items()} == {name: as_json(written[name]) for name in read}


def types_of(kind: type) -> dict[str, Any]:
    """The types of a record's fields, by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def as_json(hint: Any) -> Any:
    """Return a type of a record, or of its JSON object, in one form: a dict has the keys that are read."""
    options = get_args(hint)
    if hint in (str, int, float, bool, Any):
        return hint
    if get_origin(hint) in (Union, UnionType):
        [inner] = [each for each in options if each is not type(None)]
        return as_json(inner)
    if get_origin(hint) in (tuple, Sequence):
        return [as_json(options[0])]
    if get_origin(hint) is Mapping or hint is CountedRecord:  # which `read_counted` reads as a whole
        return Mapping
    read = hint if is_typeddict(hint) else getattr(windows, f"{hint.__name__.removesuffix('Record')}JSON")
    of = get_type_hints(hint)
    return {name: as_json(of[name]) for name in get_type_hints(read)}


def test_the_counted_stretch_of_a_lease() -> None:
    """It is read as a type; keys that are not known here are ignored, and what it lacks is None or empty."""
    counted = read_counted(record_of(record(1, WindowKind.LEASE))["counted"] or {})
    assert (counted.prompts, counted.seconds, counted.in_flight) == (1, 2.0, InFlight(1, 1.0))
    other = read_counted({"seconds": 3, "flags": ["a"], "new": 1})
    assert (other.seconds, other.units, other.in_flight, other.flags) == (3.0, None, InFlight(None, None), ("a",))


def test_the_label_of_the_counter() -> None:
    """A record that does not tell the label of its counters has none."""
    assert counter_label_of(record(1, label="modeled", counter_label="measured")) == "measured"
    assert counter_label_of(window(1)) is None
