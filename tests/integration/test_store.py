"""The store's promises, on every kind of database. What happens when something breaks: test_store_faults.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.accounting.windows import KeptWindow
from registry.core.decision import Changes, Snapshot
from registry.core.records import WrapperStatus
from registry.errors import StoreUnavailable
from registry.store.rows import EventRow, IdempotencyRow, StoredEvent
from registry.store.store import Store
from registry.wire.words import RequestStatus, WindowKind
from tests.support.energy_windows import window
from tests.support.stored_records import (
    BIGGEST,
    LEASE,
    MACHINE,
    MEASUREMENT,
    ODD,
    REQUEST,
    SMALL,
    SPEC,
    WRAPPER,
    as_sets,
    changes,
)

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
