"""Energy windows as CSV, one row each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import fields

from registry.accounting.window_report import WindowReport

COLUMNS = tuple(field.name for field in fields(WindowReport) if field.name not in {"detail", "counted"})


def windows_csv(windows: Iterable[WindowReport], *, heading: bool = True) -> str:
    """Return windows as CSV, by default with a heading.

    An unknown value is an empty cell, never 0. Only rows with ``adds_up`` true may be added; the others repeat them.
    The time to add is ``reserved_s``: the ``seconds`` of an idle window contain the prompts in between.
    """
    out = io.StringIO(newline="")
    table = csv.writer(out)
    if heading:
        table.writerow(COLUMNS)
    for window in windows:
        cells = (getattr(window, name) for name in COLUMNS)
        table.writerow(" ".join(cell) if isinstance(cell, tuple) else cell for cell in cells)
    return out.getvalue()
