"""A report's windows as CSV, one row each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from registry.report import WindowReport

COLUMNS = tuple(field.name for field in fields(WindowReport) if field.name != "detail")


def windows_csv(windows: Iterable[Mapping[str, Any]]) -> str:
    """Windows, as the report's JSON has them, as CSV with a heading. What is not known is an empty cell, never 0."""
    out = io.StringIO(newline="")
    table = csv.DictWriter(out, COLUMNS, extrasaction="ignore")
    table.writeheader()
    table.writerows({**window, "flags": " ".join(window["flags"])} for window in windows)
    return out.getvalue()
