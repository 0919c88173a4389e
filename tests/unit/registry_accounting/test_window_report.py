"""An energy window as clients see it, of old and new records."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.accounting.window_report import WindowReport, window_report
from registry.wire.words import WindowKind
from tests.support.energy_windows import iso, kept, record, request, window


def told(window_: object) -> WindowReport:
    (row,) = kept(window_)  # type: ignore[arg-type] # one of both builders
    return window_report(row, request("r-1", "org/tiny"), iso)


def test_a_full_record_is_told_with_bounds_and_parts() -> None:
    """100 ± 2 J, of which the GPU took 90: bounds, systematic error, parts and what was in flight are columns."""
    row = told(record(1, warmup=True, in_flight={"max": 4, "mean": 2.5}))
    assert (row.joules, row.low_j, row.high_j, row.systematic_j) == (100.0, 98.0, 102.0, 0.5)
    assert (row.gpu_j, row.cpu_j, row.dram_j, row.other_j) == (90.0, 10.0, None, None)
    assert (row.warmup, row.status, row.in_flight_max, row.in_flight_mean) == (True, "answered", 4, 2.5)
    assert (row.window, row.process, row.answer_id, row.llm) == ("process 1-p1", "process 1", "chatcmpl-1", "org/tiny")
    assert row.m_low_g == 16.7 * 2 / 3600
    assert row.o_low_g == pytest.approx(98 / 3.6e6 * 280.0)
    assert (row.grid, row.grid_low, row.grid_high) == (329.7, 280.0, 380.0)


def test_a_score_is_as_good_as_its_worst_part() -> None:
    """Measured joules times a published grid intensity are no measurement: the score is `sourced`, in old records too.

    An old record says `measured` there: 95 % of a French score are sourced embodied carbon.
    """
    assert told(record(1)).sci_method == "sourced"
    assert told(window(1)).sci_method == "sourced"
    assert told(window(1, label="modeled")).sci_method == "modeled"
    assert told(record(1, methods={"E": "measured", "I": "a word of the future"})).sci_method == "unavailable"


def test_lease_rows_do_not_add_up() -> None:
    """A lease window holds its prompts and idle time once more."""
    assert [told(record(1, kind)).adds_up for kind in WindowKind] == [kind != WindowKind.LEASE for kind in WindowKind]


def test_an_old_or_empty_record_is_read() -> None:
    """What it does not say is None."""
    old = told(window(1))
    assert (old.joules, old.low_j, old.systematic_j, old.warmup, old.status, old.m_low_g) == (100.0, *[None] * 5)
    empty = told(replace(window(1), detail="{}"))
    assert (empty.joules, empty.units, empty.flags, empty.counted) == (100.0, None, (), None)


def test_a_part_that_is_not_known_is_no_sum() -> None:
    """Of two GPUs one has no figure: the GPUs' joules are not known; a part of another kind is told apart."""
    components = [{"name": "gpu:1", "joules": 5.0}, {"name": "gpu:2", "joules": None}, {"name": "psu", "joules": 1.0}]
    row = told(record(1, energy={"components": components}))
    assert (row.gpu_j, row.cpu_j, row.other_j) == (None, None, 1.0)


def test_records_of_other_versions_are_read() -> None:
    """What a record lacks is None or empty, and keys that are not known here are ignored."""
    row = replace(record(1, joules=None), detail='{"of the future":1,"energy":null,"tokens":null}')
    empty = told(row)
    assert (empty.low_j, empty.gpu_j, empty.grid, empty.units, empty.prompt_tokens, empty.in_flight_max) == (None,) * 6
    assert (empty.flags, empty.sci_method) == ((), "unavailable")
