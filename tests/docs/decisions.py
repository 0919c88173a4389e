"""docs/decisions: the files, the comments that name them in the code (``D33``), and the page that lists them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tests.docs.markdown import table
from tests.docs.modules import HOUSES, ROOT

DECISIONS: Final = ROOT / "docs" / "decisions"
PARTS: Final = ("Context", "Choice", "Cost", "Where", "Test")
"""The parts of a decision, in their order."""

_FILE: Final = re.compile(r"\d{4}-[a-z0-9-]+\.md")
_PART: Final = re.compile(r"^\*\*(\w+)\.\*\* ", re.MULTILINE)
_SUPERSEDED: Final = re.compile(r"^superseded by \d{4}$", re.MULTILINE | re.IGNORECASE)
_PATH: Final = re.compile(r"`([\w./-]+/[\w.-]+\.\w+)`")
_NAMED: Final = re.compile(r"\bD(\d{1,4})\b")


class Decision(NamedTuple):
    """A decision's file. One that is not in force has a line "superseded by NNNN"."""

    path: Path
    text: str

    @property
    def number(self) -> int:
        """The number in the file's name."""
        return int(self.path.name[:4])

    @property
    def title(self) -> str:
        """The heading without the number."""
        return self.text.splitlines()[0].partition(" · ")[2]

    @property
    def in_force(self) -> bool:
        """Whether the code still keeps it."""
        return _SUPERSEDED.search(self.text) is None

    @property
    def parts(self) -> dict[str, str]:
        """The text of each part by its name, in the order of the file."""
        _, *pieces = _PART.split(self.text)
        return dict(zip(pieces[::2], pieces[1::2], strict=True))

    def files(self, part: str) -> list[Path]:
        """Return the files that a part names."""
        return [ROOT / name for name in _PATH.findall(" ".join(self.parts[part].split()))]


def decisions() -> list[Decision]:
    """Return all decisions, by number."""
    return [Decision(path, path.read_text()) for path in sorted(DECISIONS.glob("[0-9]*.md"))]


def numbers_in(path: Path) -> set[int]:
    """Return the numbers of the decisions that a source file names."""
    return {int(number) for number in _NAMED.findall(path.read_text())}


def source_files() -> Iterator[Path]:
    """Return every source file of the product and of its tests."""
    return (path for folder in (*HOUSES, "tests") for path in sorted((ROOT / folder).rglob("*.py")))


def is_well_named(decision: Decision) -> bool:
    """Whether a decision's name and heading have the same number, in four digits."""
    return bool(_FILE.fullmatch(decision.path.name)) and decision.text.startswith(f"# {decision.number:04d} · ")


def decisions_page() -> str:
    """Return the page that lists them."""
    rows = [
        (f"[{each.number:04d}]({each.path.name})", each.title if each.in_force else f"{each.title} (superseded)")
        for each in decisions()
    ]
    page = f"""\
# Decisions

Made from the files by `.venv/bin/python -m tests.docs`; a test keeps it current.

Why the code is as it is: what the problem was, what was chosen, and what that costs. The code names a
decision by a comment such as `# D33: the fence`. Numbers that are missing are not in use.

{table(("number", "decision"), rows)}"""
    return page.rstrip() + "\n"
