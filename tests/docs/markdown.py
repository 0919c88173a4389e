"""What the generated pages have in common: tables, and text of docstrings as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Final

MADE: Final = "Made from the code by `.venv/bin/python -m tests.docs`; a test keeps it current.\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, with an empty line after it."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"


def text(of: str | None) -> str:
    """Return a docstring or a description as text outside of tables; "" for None."""
    plain = re.sub(r"(?<!`)`([^`\n]+)`(?!`)", r"``\1``", inspect.cleandoc(of or ""))
    pieces = re.split(r"(``[^`]+``)", plain)
    return "".join(
        f"`{piece[2:-2]}`" if piece.startswith("``") else piece.replace("<", "&lt;").replace("*", "\\*")
        for piece in pieces
    )


def cell(of: str | None) -> str:
    """Return the same in one line, for a cell of a table."""
    return " ".join(text(of).split()).replace("|", "\\|")


def code(what: str) -> str:
    """Return a word as code, for a cell of a table."""
    return f"`{what}`".replace("|", "\\|")


def sentence(of: str | None) -> str:
    """Return the first sentence of a docstring, for a cell of a table."""
    return re.split(r"(?<=\.) ", cell(of))[0]
