"""The store's promises, on every kind of database. What happens when something breaks: test_store_faults.py."""

from __future__ import annotations

import logging
import stat
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import NullPool, Table, create_engine, text

from registry.accounting.windows import KeptWindow
from registry.core.decision import Changes, Snapshot
from registry.core.records import Lease, LLMMemory, LLMSpec, Machine, Measurement, Request, Wrapper, WrapperStatus
from registry.errors import BadSettings, StoreUnavailable
from registry.store.migrations import tables
from registry.store.rows import EventRow, IdempotencyRow, StoredEvent
from registry.store.store import Store
from registry.wire.words import Grade, Priority, RequestStatus, WindowKind
from tests.support.energy_windows import window

BIGGEST = 2**63 - 1
ODD = "naïve 模型 🌱 \"quoted\" 'single' \\n \n\t %s :name {}"
SPEC = LLMSpec(ODD, "text-generation", revision="main", engine_args='{"dtype":"bfloat16"}', gpus=8)

MACHINE = Machine("m-1", "node", "10.0.0.1")
WRAPPER = Wrapper("w-1", "m-1", "http://10.0.0.1:8000/wrappers/w-1")
MEASUREMENT = Measurement(7, seq=1)
REQUEST = Request("r-1", 7, seq=1, spec=SPEC, llmconfig="{}")
LEASE = Lease("r-1", "w-1", "1", "ab" * 32, granted_s=1.0, deadline_s=2.0, idle_limit_s=3.0, last_active_s=4.0)
SMALL = Snapshot((MACHINE,), (WRAPPER,), (MEASUREMENT,), (REQUEST,), (LEASE,))

EXTREME = Snapshot(
    machines=(
        Machine(
            machine_id=ODD,
            node_id=ODD,
            address=ODD,
            alive=False,
            gpus=16,
            gpu_type=ODD,
            memory_bytes=BIGGEST,
            gpu_memory_bytes=BIGGEST,
            draining=True,
            zone=ODD,
            region=ODD,
        ),
        Machine("", "", ""),
    ),
    wrappers=(
        Wrapper(
            wrapper_id=ODD,
            machine_id=ODD,
            url=ODD,
            gpus=16,
            status=WrapperStatus.LEASED,
            epoch=BIGGEST,
            spec=SPEC,
            request_id=ODD,
            home=LLMSpec("", ""),
            last_used_s=1.7e9 + 1e-6,
            failures=2**31 - 1,
            reason=ODD * 10_000,
        ),
        Wrapper("", "", ""),
    ),
    measurements=(
        Measurement(
            BIGGEST,
            BIGGEST,
            ODD,
            Priority.HIGH,
            ODD,
            (ODD, "", "machine_changed"),
            1.7e9 + 1e-6,
            ODD,
            ODD,
            1.7e9 + 1e-6,
        ),
        Measurement(1, 0),
        Measurement(1, 0, "another"),
    ),
    requests=(
        Request(
            request_id=ODD,
            measurement_id=BIGGEST,
            seq=BIGGEST,
            spec=SPEC,
            llmconfig=ODD * 10_000,
            status=RequestStatus.DEPLOYED,
            reason=ODD * 10_000,
            notes=(ODD, ""),
            wrapper_id=ODD,
            machine_id=ODD,
            failed_on=("gone", ODD),
            overtaken=2**31 - 1,
            created_s=0.1,
            deploying_s=0.2,
            deployed_s=0.3,
            ended_s=0.4,
            memory=LLMMemory(BIGGEST, BIGGEST, 2**31 - 1, 1e-3, 16),
            max_j=1e15,
            max_g=1e-300,
            model_revision=ODD,
            grade=Grade.MEASUREMENT,
            like_request_id=ODD,
            provenance=ODD * 10_000,
            tenant=ODD,
        ),
        Request("", 1, 0, LLMSpec("", ""), ""),
    ),
    leases=(Lease(ODD, ODD, ODD, ODD, 1e-300, 1e300, float("inf"), -0.5), Lease("", "", "", "", 0.0, 0.0, 0.0, 0.0)),
)


def changes(snapshot: Snapshot, **removed: tuple[str, ...]) -> Changes:
    """The changes that put everything of a snapshot."""
    return Changes(
        snapshot.machines, snapshot.wrappers, snapshot.measurements, snapshot.requests, snapshot.leases, **removed
    )


def as_sets(snapshot: Snapshot) -> dict[str, set[object]]:
    """A snapshot without its meaningless order; fails when a record occurs twice."""
    kinds = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
    assert all(len(set(records)) == len(records) for records in kinds.values())
    return {kind: set(records) for kind, records in kinds.items()}


# --- records ------------------------------------------------------------------------------------------------


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


# --- changes ------------------------------------------------------------------------------------------------


def test_a_record_that_is_put_again_replaces_the_old_one(store: Store):
    """A put record stands for its id alone: it replaces an older one whole and touches no other."""
    store.commit(changes(SMALL))
    newer = Snapshot(
        (replace(MACHINE, alive=False, gpu_type="H100"),),
        (replace(WRAPPER, status=WrapperStatus.FAILED, reason="because", spec=SPEC),),
        (replace(MEASUREMENT, machine_id="m-1", flags=("machine_changed",)),),
        (replace(REQUEST, status=RequestStatus.FAILED, failed_on=("w-1",), ended_s=9.0),),
        (replace(LEASE, last_active_s=9.0),),
    )
    store.commit(changes(newer))
    assert store.load() == newer
    store.commit(Changes(machines=(replace(MACHINE, machine_id="m-2"),)))
    assert set(store.load().machines) == {newer.machines[0], replace(MACHINE, machine_id="m-2")}
    store.commit(changes(SMALL))
    assert store.load().wrappers == (WRAPPER,)  # None replaces a value, too


def test_ended_leases_and_removed_wrappers_go(store: Store):
    """A lease ends and its wrapper goes in one change; the request stays, for its client to read."""
    store.commit(changes(SMALL))
    store.commit(Changes(ended_leases=("r-1",), removed_wrappers=("w-1",)))
    assert store.load() == replace(SMALL, wrappers=(), leases=())
    store.commit(Changes(ended_leases=("r-1",), removed_wrappers=("w-1",)))


def test_a_wrapper_goes_from_one_lease_to_the_next_in_one_change(store: Store):
    """Release and next grant of a wrapper may be one decision."""
    store.commit(changes(SMALL))
    waiting = replace(REQUEST, request_id="r-2", seq=2)
    next_lease = replace(LEASE, request_id="r-2", token_id="another")
    store.commit(Changes(requests=(waiting,), leases=(next_lease,), ended_leases=("r-1",)))
    assert store.load().leases == (next_lease,)


@pytest.mark.parametrize(
    "wrong",
    [
        Changes(leases=(replace(LEASE, request_id="r-2"),)),
        Changes(leases=(replace(LEASE, wrapper_id="w-2"),)),
        Changes(removed_wrappers=("w-1",)),
        Changes(requests=(replace(REQUEST, measurement_id=8),)),
        Changes(measurements=(replace(MEASUREMENT, measurement_id=2**63),)),
        Changes(requests=(replace(REQUEST, request_id="\ud800"),)),
    ],
    ids=["second lease", "no wrapper", "wrapper in use", "no measurement", "too big", "no character"],
)
def test_a_commit_is_all_or_nothing(store: Store, wrong: Changes):
    """When one part can't be written, nothing is: not the records before it, not the event, not the idempotency key."""
    store.commit(changes(SMALL), events=(EventRow("Before", 1.0),))
    new = (replace(REQUEST, request_id="r-2"), replace(REQUEST, reason="changed"))
    with pytest.raises(StoreUnavailable):
        store.commit(
            replace(wrong, machines=(replace(MACHINE, alive=False),), requests=(*wrong.requests, *new)),
            events=(EventRow("After", 2.0),),
            idempotency=IdempotencyRow("tenant", "key", "00", ("r-2",), 2.0),
        )
    assert store.load() == SMALL
    assert [stored.event.kind for stored in store.events()] == ["Before"]
    assert store.idempotent_request_ids("tenant", "key") is None


# --- events, idempotency keys, forgetting ---------------------------------------------------------------------


def test_events_are_told_in_their_order(store: Store):
    """Events come back whole, oldest first, from any place on, at most so many, of all requests or of one."""
    rows = [EventRow("LeaseRequested", 1.0, "w", "r-1", BIGGEST, "cause", '{"why": "ä"}'), EventRow("TimePassed", 2.0)]
    rows += [EventRow("LeaseReleased", 3.0, request_id="r-1"), EventRow("LeaseReleased", 4.0, request_id="r-2")]
    for row in rows:
        store.commit(Changes(), events=(row,))
    everything = store.events()
    assert [stored.event for stored in everything] == rows
    assert [stored.event_id for stored in everything] == sorted({stored.event_id for stored in everything})
    assert store.events(limit=3) == everything[:3]
    assert store.events(after=everything[1].event_id) == everything[2:]
    assert store.events(request_id="r-1") == (everything[0], everything[2])
    assert store.events(request_id="r-1", after=everything[0].event_id, limit=1) == (everything[2],)
    assert store.events(after=everything[-1].event_id) == ()


def test_an_idempotency_key_belongs_to_its_tenant(store: Store):
    """The ids come back in their order, to the same tenant and key only."""
    store.commit(Changes(), idempotency=IdempotencyRow("a", ODD, "ab12", ("r-2", "r-1"), 1.0))
    assert store.idempotent_request_ids("a", ODD) == ("ab12", ("r-2", "r-1"))
    assert store.idempotent_request_ids("b", ODD) is None
    assert store.idempotent_request_ids("a", ODD + " ") is None


def test_what_ended_long_ago_is_forgotten(store: Store):
    """Ended requests, their measurements, events and keys of before a time go; what ended later or not at all stays."""
    old = replace(REQUEST, request_id="old", measurement_id=1, status=RequestStatus.RELEASED, ended_s=9.9)
    kept = replace(REQUEST, request_id="kept", status=RequestStatus.RELEASED, ended_s=10.0)
    also_old = replace(old, request_id="also old", measurement_id=7)
    measurements = (MEASUREMENT, replace(MEASUREMENT, measurement_id=1))
    store.commit(
        replace(changes(SMALL), measurements=measurements, requests=(REQUEST, old, kept, also_old)),
        events=(EventRow("Old", 9.9),),
        idempotency=IdempotencyRow("t", "old", "", (), 9.9),
    )
    store.commit(Changes(), events=(EventRow("Kept", 10.0),), idempotency=IdempotencyRow("t", "kept", "", (), 10.0))
    last = store.events()[-1]

    part = store.forget(ended_before_s=10.0, limit=10)
    assert (sorted(part.request_ids), part.more) == (["also old", "old"], False)
    assert as_sets(store.load()) == as_sets(replace(SMALL, requests=(REQUEST, kept)))
    assert store.events() == (last,)
    assert store.idempotent_request_ids("t", "old") is None
    assert store.idempotent_request_ids("t", "kept") is not None


def test_forgetting_takes_parts(store: Store):
    """No part removes more than ``limit`` rows of a kind: 5 windows, 5 events and 3 requests go in 5 parts of 2.

    Parts 1 to 3 take 2, 2 and 1 windows and events; the third one, with room left, begins with the requests.
    """
    old = [replace(REQUEST, request_id=f"r-{n}", status=RequestStatus.RELEASED, ended_s=1.0) for n in range(3)]
    events = [EventRow("Old", 1.0)] * 5
    store.commit(replace(changes(SMALL), requests=tuple(old), leases=()), events=events)
    store.keep_windows([KeptWindow(window(n, begun_s=1.0, seconds=0.5), "m", "default") for n in range(5)])
    left = []
    for _ in range(5):
        part = store.forget(ended_before_s=10.0, limit=2)
        left.append((len(store.windows(("default", 7))), len(store.events()), len(store.load().requests), part.more))
    assert left == [(3, 3, 3, True), (1, 1, 3, True), (0, 0, 1, True), (0, 0, 0, False), (0, 0, 0, False)]
    assert store.load().measurements == ()


def test_what_is_unfinished_is_loaded_alone(store: Store):
    """Of 3 measurements one has something unfinished: it is loaded with that and the request it was last served with.

    The next number is above those of all requests, also those that are not loaded.
    """
    served = replace(REQUEST, status=RequestStatus.RELEASED, deployed_s=1.0, ended_s=2.0, machine_id="m-1")
    requests = [
        replace(served, request_id="first", seq=2),
        replace(served, request_id="last", seq=3),
        replace(REQUEST, request_id="cancelled", seq=4, status=RequestStatus.CANCELLED, ended_s=2.0),
        replace(REQUEST, request_id="waits", seq=5),
        replace(served, request_id="over", measurement_id=8, seq=9),
        replace(served, request_id="another's", tenant="another", seq=8),
    ]
    more = (replace(MEASUREMENT, measurement_id=8), replace(MEASUREMENT, tenant="another"))
    store.commit(Changes(measurements=(MEASUREMENT, *more), requests=tuple(requests)))
    loaded = store.load(ended=False)
    assert loaded.measurements == (MEASUREMENT,)
    assert {request.request_id for request in loaded.requests} == {"last", "waits"}
    assert store.next_seq() == 10


def test_requests_of_a_measurement_come_in_pages(store: Store):
    """In their order, from a number on; those of another tenant's measurement with the same id are not among them."""
    requests = tuple(replace(REQUEST, request_id=f"r-{n}", seq=n) for n in (3, 1, 2, 4))
    other = replace(REQUEST, request_id="other", seq=5, tenant="another")
    store.commit(
        Changes(measurements=(MEASUREMENT, replace(MEASUREMENT, tenant="another")), requests=(*requests, other))
    )
    key = ("default", 7)
    assert [each.seq for each in store.requests_of(key)] == [1, 2, 3, 4]
    assert [each.seq for each in store.requests_of(key, after_seq=1, limit=2)] == [2, 3]
    assert store.requests_of(key, after_seq=4) == ()
    assert set(store.requests(["r-1", "none", "other", "a\0"])) == {requests[1], other}
    assert store.last_served(key) is None
    served = replace(requests[0], deployed_s=1.0, machine_id="m-1")
    store.commit(Changes(requests=(served, replace(requests[1], deployed_s=1.0, machine_id="m-1"))))
    assert store.last_served(key) == served
    assert store.measurement(key) == MEASUREMENT
    assert store.measurement(("default", 8)) is None


def test_an_event_number_is_never_used_twice(store: Store, database_url: str):
    """Who reads the log from a number on misses nothing, even when the events before it were forgotten."""
    store.commit(Changes(), events=(EventRow("Old", 1.0),))
    (old,) = store.events()
    store.forget(ended_before_s=2.0, limit=10)
    store.close()
    again = Store.open(database_url)
    again.commit(Changes(), events=(EventRow("New", 3.0),))
    (new,) = again.events(after=old.event_id)
    assert new == StoredEvent(new.event_id, EventRow("New", 3.0))
    again.close()


# --- the database itself --------------------------------------------------------------------------------------


def test_the_revisions_make_the_tables_that_the_code_knows(store: Store, database_url: str):
    """Alembic finds nothing to do between a database that all revisions made and the tables in the code."""
    store.close()
    with create_engine(database_url, poolclass=NullPool).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.METADATA) == []


def test_a_database_of_a_newer_version_is_refused(store: Store, database_url: str):
    """Tables that this version doesn't know are a matter of the installation, not of waiting."""
    store.close()
    with create_engine(database_url, poolclass=NullPool).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(BadSettings, match="9999"):
        Store.open(database_url)


def test_opening_leaves_logging_alone(database_url: str):
    """Alembic's usual environment configures logging; ours does not."""
    root = logging.getLogger()
    before = (root.level, list(root.handlers), logging.getLogger("alembic").level, logging.root.manager.disable)
    named = logging.getLogger("registry.somebody")
    Store.open(database_url).close()
    assert before == (root.level, root.handlers, logging.getLogger("alembic").level, logging.root.manager.disable)
    assert not named.disabled


def test_a_commit_waits_for_the_disk(store: Store):
    """The settings under which a committed transaction survives a power cut are in force."""
    with store._connection.begin():
        ask = store._connection.exec_driver_sql
        if store._connection.dialect.name == "sqlite":
            assert ask("PRAGMA journal_mode").scalar() == "wal"
            assert ask("PRAGMA synchronous").scalar() == 2  # FULL
            assert ask("PRAGMA foreign_keys").scalar() == 1
        else:
            assert ask("SHOW synchronous_commit").scalar() == "on"


def test_closing_leaves_one_file_and_the_lock(sqlite_url: str, tmp_path: Path):
    """A closed SQLite database is one file to copy, which nobody else may read; closing again is no error."""
    store = Store.open(sqlite_url)
    store.commit(changes(SMALL), events=(EventRow("Something", 1.0),))
    store.close()
    store.close()
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()}
    assert files == {"registry.db": 0o600, "registry.db.lock": 0o600}


@pytest.mark.parametrize("use", [Store.load, Store.events, lambda store: store.commit(changes(SMALL))])
def test_a_closed_store_says_so(store: Store, use: Any):
    """Using a store after closing it fails, and opens nothing behind the owner's back."""
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        use(store)


# --- energy windows -----------------------------------------------------------------------------------------

USED = window(1, joules=7.5, units=3, odd=ODD)
ROWS = (
    KeptWindow(USED, ODD, "default"),
    KeptWindow(window(2, WindowKind.LOAD, request_id=None, measurement_id=None, joules=None), None, None),
    KeptWindow(window(3, WindowKind.IDLE, begun_s=USED.begun_s - 1, measurement_id=7), "m-1", "default"),
)


def test_windows_come_back_as_they_were(store: Store, database_url: str):
    """A measurement's windows survive closing, in the order in which they began; those of nobody are no part of it."""
    store.keep_windows(ROWS)
    assert store.keep_windows(()) == frozenset()
    store.close()
    again = Store.open(database_url)
    assert again.windows(("default", 7)) == (ROWS[2], ROWS[0])
    assert again.windows(("default", 8)) == ()
    assert again.windows(("other", 7)) == ()
    again.close()


def test_a_window_is_written_once(store: Store):
    """One that is there already stays as it is, and those that come with it are written."""
    assert store.keep_windows(ROWS[:1]) == {USED.window_id}
    assert store.keep_windows((replace(ROWS[0], tenant="other"), ROWS[2])) == {ROWS[2].window.window_id}
    assert store.windows(("default", 7)) == (ROWS[2], ROWS[0])


def test_costs_are_summed_by_kind(store: Store):
    """Sums of a request's windows know what is missing, and carry the worst label."""
    assert store.costs_of_requests(["r-1"]) == {"r-1": {}}
    windows = window(1, joules=1.0), window(2, joules=2.0, label="modeled"), window(3, WindowKind.IDLE, joules=None)
    store.keep_windows([KeptWindow(each, "m", "ann") for each in (*windows, window(4, request_id="r-2"))])
    costs = store.costs_of_requests(["r-1", "r-3"])["r-1"]
    assert costs.keys() == {WindowKind.PROMPT, WindowKind.IDLE}
    assert (costs[WindowKind.PROMPT].joules.value, costs[WindowKind.PROMPT].label) == (3.0, "modeled")
    assert costs[WindowKind.PROMPT].m_g.value == sum(each.m_g or 0 for each in windows[:2])
    idle = costs[WindowKind.IDLE]
    assert (idle.joules.value, idle.joules.count, idle.label) == (None, 1, "unavailable")


def test_costs_of_a_tenant(store: Store):
    """A tenant's sum has the kinds that are asked for, from the moment that is asked for, and nobody else's."""
    windows = [window(n, WindowKind.LEASE, begun_s=100.0 * n, seconds=1, joules=10.0**n) for n in (1, 2, 3)]
    store.keep_windows([KeptWindow(each, "m", "ann") for each in windows])
    store.keep_windows([KeptWindow(window(4, WindowKind.PROMPT, begun_s=300.0), "m", "ann")])
    store.keep_windows([KeptWindow(window(5, WindowKind.LEASE, begun_s=300.0), "m", "bob")])
    costs = store.costs_of_tenant("ann", (WindowKind.LEASE, WindowKind.LOAD), 201.0)
    assert {kind: total.joules.value for kind, total in costs.items()} == {WindowKind.LEASE: 1100.0}


def test_old_windows_are_forgotten(store: Store):
    """What ended before the given second goes, what ended then stays."""
    old, new = window(1, begun_s=10.0, seconds=2), window(2, begun_s=11.0, seconds=2)
    store.keep_windows([KeptWindow(old, None, "default"), KeptWindow(new, None, "default")])
    store.forget(ended_before_s=13.0, limit=10)
    assert [row.window.window_id for row in store.windows(("default", 7))] == [new.window_id]
