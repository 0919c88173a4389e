"""Which reports and results of a wrapper are out of date."""

from __future__ import annotations

from registry.core.commands import StopLLM
from registry.service.turns import Turns

OLD, NEW = StopLLM("w", 1), StopLLM("w", 2)


def test_a_command_in_between_makes_a_report_out_of_date() -> None:
    """The count before and after a call is equal only if no other command was in progress in between."""
    turns = Turns()
    before = turns.quiet("w")
    turns.commanded(OLD)
    assert turns.quiet("w") is None
    assert turns.quiet("w", own=OLD) is not None
    assert turns.quiet("another wrapper") == 0
    turns.ended(OLD)
    assert turns.quiet("w") not in (None, before)


def test_only_the_newest_command_counts() -> None:
    """A superseded command that ends later changes nothing, and is not waited for."""
    turns = Turns()
    turns.commanded(OLD)
    turns.commanded(NEW)
    assert not turns.is_newest(OLD)
    assert turns.is_newest(NEW)
    turns.ended(OLD)
    assert turns.is_newest(NEW)
    turns.ended(NEW)
    assert not turns.is_newest(NEW)
    assert turns.quiet("w") == 2


def test_a_wrapper_that_is_created_again_has_no_command_in_progress() -> None:
    """Results of commands to its earlier process are out of date."""
    turns = Turns()
    turns.commanded(OLD)
    turns.created("w")
    assert not turns.is_newest(OLD)
    assert turns.quiet("w") == 2
