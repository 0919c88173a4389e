from pathlib import Path

import pytest

from registry.core.records import WrapperStatus
from registry.core.transitions import (
    REQUEST_TRANSITIONS,
    WRAPPER_TRANSITIONS,
    InvariantBroken,
    as_markdown,
    check_request_transition,
    check_wrapper_transition,
)
from registry.wire.words import RequestStatus

ROOT = Path(__file__).resolve().parents[3]


def test_the_tables_name_every_status():
    """No status is forgotten in the tables."""
    assert set(REQUEST_TRANSITIONS) == set(RequestStatus)
    assert set(WRAPPER_TRANSITIONS) == set(WrapperStatus)


def test_every_transition_says_what_brings_it_about():
    """The tables can be drawn: each arrow has a label."""
    for table in (REQUEST_TRANSITIONS, WRAPPER_TRANSITIONS):
        assert all(label for row in table.values() for label in row.values())


def test_the_design_shows_the_tables():
    """registry/DESIGN.md holds the tables as they are; `print(as_markdown())` shows what belongs there."""
    _, _, rest = (ROOT / "registry" / "DESIGN.md").read_text().partition("<!-- states:begin -->\n")
    shown, end, _ = rest.partition("<!-- states:end -->")
    assert end
    assert shown == as_markdown()


def test_ended_requests_go_nowhere():
    """What has ended has ended for good."""
    assert {status for status, row in REQUEST_TRANSITIONS.items() if not row} == {s for s in RequestStatus if s.ended}


@pytest.mark.parametrize("new", RequestStatus)
@pytest.mark.parametrize("old", [None, *RequestStatus])
def test_a_request_makes_only_the_moves_of_the_table(old, new):
    """Every move that is not in the table raises; staying is allowed until the end."""
    if old is None:
        legal = new is RequestStatus.QUEUED
    else:
        legal = new in REQUEST_TRANSITIONS[old] or (old is new and not new.ended)
    if legal:
        check_request_transition("r", old, new)
    else:
        with pytest.raises(InvariantBroken, match="request r can't go from"):
            check_request_transition("r", old, new)


@pytest.mark.parametrize("new", WrapperStatus)
@pytest.mark.parametrize("old", [None, *WrapperStatus])
def test_a_wrapper_makes_only_the_moves_of_the_table(old, new):
    """Every move that is not in the table raises; staying is allowed."""
    legal = new is WrapperStatus.STARTING if old is None else new in WRAPPER_TRANSITIONS[old] or old is new
    if legal:
        check_wrapper_transition("w", old, new)
    else:
        with pytest.raises(InvariantBroken, match="wrapper w can't go from"):
            check_wrapper_transition("w", old, new)
