"""Energy windows as CSV, one row each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from registry.window_report import WindowReport

COLUMNS = tuple(field.name for field in fields(WindowReport) if field.name not in {"detail", "counted"})


def windows_csv(windows: Iterable[Mapping[str, Any]]) -> str:
    """Return windows, as the report's JSON has them, as CSV with a heading.

    What is not known is an empty cell, never 0. Rows with ``adds_up`` true add up to the whole; others hold them again.
    """
    out = io.StringIO(newline="")
    table = csv.DictWriter(out, COLUMNS, extrasaction="ignore")
    table.writeheader()
    table.writerows({**window, "flags": " ".join(window["flags"])} for window in windows)
    return out.getvalue()
