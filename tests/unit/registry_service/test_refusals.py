"""How refused calls are counted: equal ones together, and never more rows than a bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.service.audit import ROWS, ROWS_OF_ONE, Refusals
from registry.store.rows import AuditRow
from registry.wire.words import Role

ROW = AuditRow("GET", "/machines", 401, "key_refused", source="10.0.0.1")


def test_equal_calls_share_a_row() -> None:
    """It has the time of the first one, and their number; one that differs in anything has its own."""
    refusals = Refusals()
    assert not refusals
    for at_s in (11.0, 10.0, 12.0):
        refusals.add(ROW, at_s)
    refusals.add(replace(ROW, path="/llms"), 15.0)
    assert refusals.rows(20.0) == [(replace(ROW, count=3), 10.0), (replace(ROW, path="/llms"), 5.0)]


def test_calls_that_could_not_be_sent_are_counted_on() -> None:
    """Their counts and times are kept."""
    refusals, unsent = Refusals(), Refusals()
    unsent.add(ROW, 10.0, count=5)
    refusals.add(ROW, 70.0)
    refusals.add_all(unsent)
    assert refusals.rows(80.0) == [(replace(ROW, count=6), 70.0)]


CLIENT, OPERATOR = Role.CLIENT, Role.OPERATOR
NOISE = {
    "no keys": [replace(ROW, code="key_needed", source=f"10.0.0.{number}") for number in range(1000)],
    "wrong keys": [replace(ROW, source=f"10.0.0.{number}") for number in range(1000)],
    "revoked keys": [replace(ROW, source=f"10.0.0.{number}", key_id=f"{number:08x}") for number in range(1000)],
    "wrong JWTs": [replace(ROW, code="jwt_refused", source=f"10.0.0.{number}") for number in range(1000)],
    "expired JWTs": [replace(ROW, code="jwt_refused", key_id=f"https://i#{number}") for number in range(1000)],
    "web pages": [replace(ROW, status=403, code="cross_origin", source=f"10.0.0.{number}") for number in range(1000)],
    "a key": [replace(ROW, status=404, key_id="1", role=OPERATOR, subject=str(number)) for number in range(1000)],
    "a trusted client": [replace(ROW, status=404, role=CLIENT, tenant="a", subject=str(n)) for n in range(1000)],
    "a tenant's JWTs": [
        replace(ROW, status=403, key_id=f"https://i#{n}", role=CLIENT, tenant="a") for n in range(1000)
    ],
    "operators' JWTs": [replace(ROW, status=404, key_id=f"https://i#{n}", role=OPERATOR) for n in range(1000)],
}
DRAIN = replace(ROW, method="POST", path="/machines/{machine_id}/drain", status=403, code="not_allowed", subject="a")
SEEN = {
    "wrong keys": replace(ROW, source="192.0.2.1"),
    "revoked keys": replace(ROW, source="192.0.2.1", key_id="ffffffff"),
    "no keys": replace(ROW, source="192.0.2.1", code="key_needed"),
    "a key": replace(DRAIN, key_id="2", role=CLIENT, tenant="a"),
    "a trusted client": replace(DRAIN, role=CLIENT, tenant="b"),
    "another tenant's JWTs": replace(DRAIN, key_id="https://i#ann", role=CLIENT, tenant="b"),
    "viewers' JWTs": replace(DRAIN, key_id="https://i#ann", role=Role.VIEWER),
}


SHARED = {
    "web pages": {"no keys"},
    "wrong JWTs": {"wrong keys"},
    "expired JWTs": {"revoked keys"},
    "a key": set[str](),
    "a trusted client": set[str](),
}
"""Whose rows are bounded together with those of a noise; by default its own."""


@pytest.mark.parametrize(
    ("noise", "seen"),
    [(noise, seen) for noise in NOISE for seen in SEEN if seen not in SHARED.get(noise, {noise})],
)
def test_noise_does_not_hide_others(noise: str, seen: str) -> None:
    """However many calls are refused for one reason, those of other callers keep their path, source and id."""
    refusals = Refusals()
    for row in NOISE[noise]:
        refusals.add(row, 0.0)
    refusals.add(SEEN[seen], 0.0)
    rows = [row for row, _ in refusals.rows(0.0)]
    assert SEEN[seen] in rows
    assert len(rows) <= ROWS + 2


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], [f"2001:db8::{number:x}:1" for number in range(100)]],
    ids=["one address", "one /64 of IPv6"],
)
def test_one_network_does_not_hide_others(addresses: list[str]) -> None:
    """A caller that tries wrong keys on many paths, from all addresses that it has, leaves rows for other sources."""
    refusals = Refusals()
    for number in range(1000):
        refusals.add(replace(ROW, path=f"/{number}", source=addresses[number % len(addresses)]), 0.0)
    others = [replace(ROW, source=f"2001:db8:0:{number:x}::1") for number in range(1, 4)]
    for other in others:
        refusals.add(other, 0.0)
    rows = [row for row, _ in refusals.rows(0.0)]
    assert rows[: ROWS_OF_ONE + 1] == [
        *(replace(ROW, path=f"/{n}", source=addresses[n % len(addresses)], count=1) for n in range(ROWS_OF_ONE)),
        replace(ROW, method="", path=None, source=None, count=1000 - ROWS_OF_ONE),
    ]
    assert rows[ROWS_OF_ONE + 1 :] == others


def caller(kind: str, number: int) -> AuditRow:
    """Return the row of a kind of caller, of which there are several."""
    if kind == "key":
        return replace(ROW, code="x", key_id=str(number), role=CLIENT, tenant=f"tenant {number % 2}")
    if kind == "trusted":
        return replace(ROW, code="x", role=CLIENT, tenant=f"tenant {number}")
    if kind == "revoked":
        return replace(ROW, key_id=str(number))
    return replace(ROW, code="key_refused" if kind == "wrong" else "key_needed")


CALLERS = st.builds(caller, st.sampled_from(["key", "trusted", "revoked", "wrong", "nobody"]), st.integers(0, 3))
CALLS = st.builds(
    replace,
    CALLERS,
    method=st.sampled_from(["GET", "POST"]),
    path=st.sampled_from(["/a", "/b", None]),
    status=st.sampled_from([401, 404]),
    source=st.none() | st.integers(0, 60).map(lambda n: f"10.0.0.{n}") | st.integers(0, 9).map(lambda n: f"fe80::{n}"),
    subject=st.integers(0, 60).map(str),
)


@given(st.lists(CALLS, max_size=300), st.integers(0, 300))
def test_rows_are_bounded_and_no_call_is_lost(calls: list[AuditRow], sent: int) -> None:
    """Each call is counted once, and each kind of caller has few rows: the bound, and one for each outcome."""
    refusals, unsent = Refusals(), Refusals()
    for number, call in enumerate(calls):
        (unsent if number < sent else refusals).add(call, 0.0)
    refusals.add_all(unsent)
    rows = [row for row, _ in refusals.rows(0.0)]
    assert sum(row.count for row in rows) == len(calls)
    exact = [row for row in rows if row.method]
    kinds = {(row.key_id if row.role else bool(row.key_id), row.tenant, row.code) for row in exact}
    assert len(kinds) <= 4 + 4 + 3
    for kind in kinds:
        mine = [r for r in exact if (r.key_id if r.role else bool(r.key_id), r.tenant, r.code) == kind]
        assert len(mine) <= ROWS
    outcomes = {(row.status, row.code, row.key_id if row.role else None, row.role, row.tenant) for row in rows}
    assert len(rows) - len(exact) <= len(outcomes)
