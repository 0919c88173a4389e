"""How refused calls are counted: equal ones together, and never more rows than a bound."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from registry.service.audit import ROWS_OF_STRANGERS, Refusals, at_start
from registry.store.rows import AuditRow

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


def test_many_sources_do_not_hide_a_key() -> None:
    """However many strangers there are, a key's refusals keep their path and id."""
    refusals = Refusals()
    for number in range(1000):
        refusals.add(replace(ROW, source=f"10.0.0.{number}"), 0.0)
    own = replace(ROW, status=403, code="not_allowed", key_id="0a1b2c3d", subject="a")
    refusals.add(own, 0.0)
    assert (own, 0.0) in refusals.rows(0.0)


callers = st.builds(
    AuditRow,
    method=st.sampled_from(["GET", "POST"]),
    path=st.sampled_from(["/a", "/b", None]),
    status=st.sampled_from([401, 404]),
    code=st.sampled_from(["key_needed", "unknown_request"]),
    key_id=st.sampled_from([None, "1", "2"]),
    source=st.integers(0, 60).map(str),
    subject=st.integers(0, 60).map(str),
)


@given(st.lists(callers, max_size=300))
def test_rows_are_bounded_and_no_call_is_lost(calls: list[AuditRow]) -> None:
    """Each call is counted once, and each key has few rows: the bound, and one for each outcome."""
    refusals = Refusals()
    for call in calls:
        refusals.add(call, 0.0)
    rows = [row for row, _ in refusals.rows(0.0)]
    assert sum(row.count for row in rows) == len(calls)
    for key_id in (None, "1", "2"):
        assert sum(row.key_id == key_id for row in rows) <= ROWS_OF_STRANGERS + 4


def test_the_start_is_no_call() -> None:
    """What the registry does at its start has no caller."""
    row = at_start("/keys", 201)
    assert (row.method, row.key_id, row.source) == ("start", None, None)
