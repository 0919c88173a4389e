"""Every record comes back from the store as it was put, on every kind of database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Table

from registry.core.decision import Changes, Snapshot
from registry.core.records import Lease, LLMMemory, LLMSpec, Machine, Measurement, Request, Wrapper
from registry.store.migrations import tables
from registry.store.rows import EventRow, IdempotencyRow
from registry.store.store import Store
from tests.support.stored_records import (
    BIGGEST,
    EXTREME,
    REQUEST,
    SMALL,
    as_sets,
    changes,
)


def test_a_new_database_is_empty(store: Store):
    """A database that was not there before is made, and holds nothing."""
    assert store.load() == Snapshot()
    assert store.events() == ()


@pytest.mark.parametrize("snapshot", [SMALL, EXTREME], ids=["small", "extreme"])
def test_records_come_back_as_they_were(store: Store, database_url: str, snapshot: Snapshot):
    """Every kind of record survives closing and opening, with the strangest values that it may have."""
    store.commit(changes(snapshot))
    assert as_sets(store.load()) == as_sets(snapshot)
    store.close()
    with_again = Store.open(database_url)
    assert as_sets(with_again.load()) == as_sets(snapshot)
    with_again.close()


def _tables_and_records() -> list[tuple[Table, type[Any]]]:
    """The record of each field of Snapshot with the table of that name, and the two rows that are no records."""
    hints = get_type_hints(Snapshot)
    pairs = [(tables.METADATA.tables[kind], get_args(hint)[0]) for kind, hint in hints.items()]
    return [*pairs, (tables.IDEMPOTENCY_KEYS, IdempotencyRow)]


@pytest.mark.parametrize(("table", "record"), _tables_and_records(), ids=lambda it: getattr(it, "name", ""))
def test_every_field_has_its_column(table: Table, record: type[Any]):
    """A record's fields are its table's columns, in the same order; NULL may be where the field may be None."""
    assert [column.name for column in table.columns] == [field.name for field in fields(record)]
    hints = get_type_hints(record)
    assert {column.name for column in table.columns if column.nullable} == {
        name for name, hint in hints.items() if type(None) in get_args(hint)
    }


def test_every_field_of_an_event_has_its_column():
    """The log's columns are its own number and then an EventRow's fields."""
    columns = [column.name for column in tables.EVENTS.columns]
    assert columns == ["event_id", *(field.name for field in fields(EventRow))]


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
times = st.floats(allow_nan=False)
counts = st.integers(0, 2**31 - 1)
big = st.integers(0, BIGGEST)
specs = st.builds(LLMSpec, words, words, st.none() | words, words, st.integers())
memories = st.builds(LLMMemory, big, st.none() | big, st.none() | counts, st.floats(0, 1), st.none() | counts)


def records(kind: type[Any], **known: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Records with any value that their fields' types allow, but for the fields that are given."""
    by_type: dict[object, st.SearchStrategy[Any]] = {
        str: words,
        float: times,
        int: counts,
        bool: st.booleans(),
        LLMSpec: specs,
        LLMMemory: memories,
        tuple[str, ...]: st.lists(words, max_size=3).map(tuple),
    }

    def values(hint: Any) -> st.SearchStrategy[Any]:
        if type(None) in get_args(hint):
            return st.none() | values(next(arg for arg in get_args(hint) if arg is not type(None)))
        return by_type[hint] if hint in by_type else st.sampled_from(list(hint))

    hints = get_type_hints(kind)
    return st.builds(kind, **{name: values(hint) for name, hint in hints.items() if name not in known}, **known)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Any snapshot whose records belong together."""

    def many(kind: type[Any], key: str, **known: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.lists(records(kind, **known), max_size=3, unique_by=lambda it: getattr(it, key))))

    def one_of(owners: Sequence[Any], key: str) -> st.SearchStrategy[Any]:
        return st.sampled_from([getattr(owner, key) for owner in owners])

    machines = many(Machine, "machine_id", memory_bytes=st.none() | big, gpu_memory_bytes=st.none() | big)
    tenant = st.just(draw(words))
    measurements = many(Measurement, "measurement_id", measurement_id=st.integers(1, BIGGEST), seq=big, tenant=tenant)
    wrappers: tuple[Wrapper, ...] = ()
    requests: tuple[Request, ...] = ()
    leases: tuple[Lease, ...] = ()
    if machines:
        wrappers = many(Wrapper, "wrapper_id", machine_id=one_of(machines, "machine_id"), epoch=big)
    if measurements:
        measurement_ids = one_of(measurements, "measurement_id")
        requests = many(Request, "request_id", measurement_id=measurement_ids, seq=big, tenant=tenant)
    if wrappers and requests:
        a_request, a_wrapper = one_of(requests, "request_id"), one_of(wrappers, "wrapper_id")
        by_request = many(Lease, "request_id", request_id=a_request, wrapper_id=a_wrapper)
        leases = tuple({lease.wrapper_id: lease for lease in by_request}.values())
    return Snapshot(machines, wrappers, measurements, requests, leases)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(snapshot=snapshots())
def test_any_records_come_back_as_they_were(store: Store, snapshot: Snapshot):
    """Whatever the fields' types allow comes back equal, over whatever was there before."""
    before = store.load()
    store.commit(Changes(ended_leases=tuple(lease.request_id for lease in before.leases)))
    store.commit(changes(snapshot))
    after = as_sets(store.load())
    assert all(put <= after[kind] for kind, put in as_sets(snapshot).items())
    assert after["leases"] == set(snapshot.leases)


@pytest.mark.parametrize("reason", ["ends with \0 and \ud800", "\0", "\udcff"])
def test_no_error_message_can_break_a_commit(store: Store, reason: str):
    """Characters that no database holds are replaced in words for people, and the rest of them is kept."""
    store.commit(changes(replace(SMALL, requests=(replace(REQUEST, reason=reason),))))
    (request,) = store.load().requests
    assert request.reason == reason.replace("\0", "\ufffd").replace("\ud800", "?").replace("\udcff", "?")
