"""The decisions in docs/decisions and the comments in the code that name them belong together."""

from __future__ import annotations

import re

from tests.docs.decisions import PARTS, decisions, is_well_named, numbers_in, source_files
from tests.docs.modules import ROOT

WORDS = 200
"""A decision is short."""

ALL = decisions()
IN_FORCE = [decision for decision in ALL if decision.in_force]
NAMED = {path: numbers_in(path) for path in source_files()}


def test_decisions_are_short_and_complete() -> None:
    """Each decision has a number of its own, all parts in their order, and few words."""
    numbers = [decision.number for decision in ALL]
    assert sorted(set(numbers)) == numbers
    assert [each.path.name for each in ALL if not is_well_named(each)] == []
    assert [each.path.name for each in IN_FORCE if tuple(each.parts) != PARTS] == []
    assert [each.path.name for each in ALL if len(each.text.split()) > WORDS] == []


def test_every_number_in_the_code_has_its_file() -> None:
    """A comment that names a decision leads to one that is in force."""
    known = {decision.number for decision in IN_FORCE}
    found = {path.relative_to(ROOT).as_posix(): numbers - known for path, numbers in NAMED.items()}
    assert {name: numbers for name, numbers in found.items() if numbers} == {}


def test_every_decision_is_named_where_it_is_kept() -> None:
    """One of the files that a decision in force names under "Where" has a comment with its number."""
    missing = {
        f"D{each.number}": [path.relative_to(ROOT).as_posix() for path, found in NAMED.items() if each.number in found]
        for each in IN_FORCE
        if not any(each.number in NAMED.get(path, ()) for path in each.files("Where"))
    }
    assert missing == {}, "each with the files that name it; if none does, write a comment"


def test_decisions_name_files_that_are_there() -> None:
    """Each path under "Where" and "Test" is that of a file."""
    gone = [
        f"{each.path.name}: {path.relative_to(ROOT)}"
        for each in IN_FORCE
        for part in ("Where", "Test")
        for path in each.files(part)
        if not path.is_file()
    ]
    assert gone == []


def test_decisions_name_code_that_is_there() -> None:
    """A name in brackets after a path occurs in that file."""
    named = [
        (each.path.name, path, name.rpartition(".")[2])
        for each in IN_FORCE
        for path, names in re.findall(r"`([\w/.]+\.py)` \(([^)]*)\)", " ".join(each.text.split()))
        for name in re.findall(r"`([\w.]+)`", names)
    ]
    assert len(named) > 100
    assert [each for each in named if each[2] not in (ROOT / each[1]).read_text(encoding="utf-8")] == []
